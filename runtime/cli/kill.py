"""`runtime kill`: send a signal to an actor's process, to see it come back."""

from __future__ import annotations

import argparse
import signal

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.control import Kill, command
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import find_node


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("actor", metavar="ACTOR", help="name of an actor or supervisor, as `runtime status` shows it")
    parser.add_argument("--signal", default="KILL", metavar="NAME", help="KILL (the default), STOP, TERM, 9 …")
    add_node(parser)
    parser.epilog = "example: runtime kill main.rank0 --signal KILL"


def run(options: argparse.Namespace) -> int:
    number = _signal(options.signal)
    command(find_node(options.node), Kill(options.actor, number))
    say(f"sent {number.name} to {options.actor}")
    return 0


def _signal(text: str) -> signal.Signals:
    """A signal by number or by name, with or without "SIG". Raises UserError."""
    try:
        return signal.Signals(int(text)) if text.isdigit() else signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (ValueError, KeyError):
        raise UserError(f"there is no signal {text}; give a name such as KILL, STOP or TERM, or a number") from None
