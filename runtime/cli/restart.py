"""`runtime restart`: stop an actor in order and start it again, or all of them one after the other."""

from __future__ import annotations

import argparse

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.control import Restart, command
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rolling import restart_all
from llm_runtime.runtime.rundir import find_node


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "actor", metavar="ACTOR", nargs="?", help="name of an actor or supervisor, as `runtime status` shows it"
    )
    parser.add_argument(
        "--rolling",
        action="store_true",
        help="replace every process below the root, by the program as it is on the disk now, under load",
    )
    add_node(parser)
    parser.epilog = "examples:\n  runtime restart main.scheduler\n  runtime restart --rolling"


def run(options: argparse.Namespace) -> int:
    if options.rolling == (options.actor is not None):
        raise UserError("give either an ACTOR or --rolling")
    run_dir = find_node(options.node)
    if options.rolling:
        say(f"{restart_all(run_dir, say)} processes of {run_dir.name} have been replaced")
        return 0
    command(run_dir, Restart(options.actor), timeout_s=600.0)
    say(f"{options.actor} is running again")
    return 0
