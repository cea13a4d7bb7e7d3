"""`runtime down`: stop a running node."""

from __future__ import annotations

import argparse
import time

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.control import Down, command
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import find_node, is_running


def configure(parser: argparse.ArgumentParser) -> None:
    add_node(parser)
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="how many seconds to wait for the end (60 by default)"
    )
    parser.epilog = "example: runtime down --node smollm2-8000"


def run(options: argparse.Namespace) -> int:
    run_dir = find_node(options.node)
    command(run_dir, Down())
    deadline = time.monotonic() + options.timeout
    while is_running(run_dir):
        if time.monotonic() > deadline:
            raise UserError(
                f"the node {run_dir.name} is still stopping after {options.timeout:g} s; see `runtime status`"
            )
        time.sleep(0.02)
    say(f"{run_dir.name} is down")
    return 0
