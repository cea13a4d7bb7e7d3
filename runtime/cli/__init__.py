"""The command line, `runtime`: one module a command. Only the chosen command's module is imported."""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from llm_runtime.runtime.cli.output import complain
from llm_runtime.runtime.environment import prepare
from llm_runtime.runtime.errors import UserError

COMMANDS = {
    "serve": "serve a model: a name, a directory, a GGUF file or a Hugging Face id",
    "up": "start a node: serve the model of a topology file",
    "check": "check a topology file without starting anything",
    "keygen": "make the keys under which several machines talk",
    "status": "show the processes of a running node",
    "top": "show the processes and figures of a running node, live",
    "logs": "show the logs and crash reports of a node",
    "restart": "stop an actor in order and start it again, or all of them in turn",
    "kill": "send a signal to an actor's process",
    "chaos": "kill processes at random under load and check that nothing is lost",
    "down": "stop a running node",
    "replay": "send the requests again that were in progress when an actor crashed",
    "chat": "chat with a model in the terminal",
    "bench": "measure latency and throughput",
    "models": "list the models on this machine",
    "pull": "download a model",
    "completion": "print the completion script of a shell",
}
_ELSEWHERE = {
    **dict.fromkeys(("run", "start", "launch"), "serve"),
    **dict.fromkeys(("stop", "quit"), "down"),
    **dict.fromkeys(("ps", "tree"), "status"),
    **dict.fromkeys(("list", "ls"), "models"),
    "download": "pull",
}
"""What commands are called in other programs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors of the user are one sentence on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    prepare()
    parser, chosen, command = _parser(arguments)
    options, unknown = parser.parse_known_args(arguments)
    assert command is not None  # the parser demands one
    assert chosen is not None
    if unknown:
        meant = _settings(unknown) if hasattr(options, "set") else ""
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    try:
        return int(command.run(options))
    except UserError as error:
        complain(error.source + str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit fails no more
        return 1
    except Exception as error:
        complain(f"runtime: {type(error).__name__}: {error} ({_save_traceback()})")
        return 1


def _parser(
    arguments: Sequence[str],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None, ModuleType | None]:
    """The parser, with the options of the command that the arguments name, and that command's own parser and module."""
    parser = argparse.ArgumentParser(
        prog="runtime",
        description="Serves language models from supervised processes.",
        epilog="example: runtime serve Qwen/Qwen3-0.6B",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    word = next((each for each in arguments if not each.startswith("-")), None)
    chosen = word if word in COMMANDS else None
    if word is not None and chosen is None:
        nearest = [_ELSEWHERE[word]] if word in _ELSEWHERE else difflib.get_close_matches(word, COMMANDS, 1)
        hint = f"did you mean `runtime {nearest[0]}`?" if nearest else "`runtime --help` lists them"
        parser.error(f"there is no command {word}: {hint}")
    gc.disable()  # imports make much and drop little: looking for it costs a tenth of the start
    module = None if chosen is None else importlib.import_module(f"llm_runtime.runtime.cli.{chosen}")
    gc.enable()
    own = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[:1].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None and name == chosen:
            module.configure(command)
            own = command
    return parser, own, module


def _settings(unknown: Sequence[str]) -> str:
    """Which `--set` does what other servers' options do, and keys that were taken for options."""
    from llm_runtime.runtime.offline.settings import key_of_option

    words = [each for each in unknown if each.startswith("--")]
    keys = [key for key in map(key_of_option, words) if key]
    return f": give {' '.join(f'--set {key}=VALUE' for key in keys)}" if keys else ""


def _version() -> str:
    try:
        return version("llm-runtime")
    except PackageNotFoundError:
        return "not installed"


def _save_traceback() -> str:
    from llm_runtime.runtime.models import cache_dir

    path = cache_dir() / "last-error.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    except OSError as error:
        return f"its traceback cannot be written to {path}: {error.strerror}"
    return f"traceback: {path}"
