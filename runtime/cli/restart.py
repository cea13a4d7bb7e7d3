"""`runtime restart`: stop an actor in order and start it again."""

from __future__ import annotations

import argparse

from runtime.cli.options import add_node
from runtime.cli.output import say
from runtime.control import Restart, command
from runtime.rundir import find_node


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("actor", metavar="ACTOR", help="name of an actor or supervisor, as `runtime status` shows it")
    add_node(parser)
    parser.epilog = "example: runtime restart main.scheduler"


def run(options: argparse.Namespace) -> int:
    command(find_node(options.node), Restart(options.actor), timeout_s=600.0)
    say(f"{options.actor} is running again")
    return 0
