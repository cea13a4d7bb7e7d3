"""`runtime chat`: a conversation in the terminal, with a running node, any server, or a node started for it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from llm_runtime.runtime.api_keys import key_from
from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import complain, say
from llm_runtime.runtime.conversation import Conversation
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.offline.node import PrivateNode
from llm_runtime.runtime.rundir import find_node, read_info

_HELP = "/clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", help="topology file of a node to start for this conversation"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key of FILE, as with `runtime up`"
    )
    add_node(parser)
    parser.add_argument("--url", help="any OpenAI-compatible server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="by default the server's first one")
    parser.add_argument("--api-key", help="sent as a bearer token; by default $RUNTIME_API_KEY")
    parser.add_argument("--system", metavar="TEXT", help="the system's message, before all others")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the most probable tokens")
    parser.epilog = (
        "examples:\n"
        "  runtime chat\n"
        "  runtime chat topology/smollm2.toml --temperature 0\n"
        '  echo "What is the capital of France?" | runtime chat --url http://127.0.0.1:8000\n'
        f"{_HELP}\n"
        "Without a terminal, standard input is one prompt."
    )


def run(options: argparse.Namespace) -> int:
    with _conversation(options) as conversation:
        if sys.stdin.isatty():
            _converse(conversation)
        else:
            prompt = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
            if not prompt:
                raise UserError("standard input is empty: give it a prompt")
            _show(conversation, prompt)
    return 0


@contextlib.contextmanager
def _conversation(options: argparse.Namespace) -> Iterator[Conversation]:
    """With the server that the options name. A node that is started for it is stopped afterwards."""
    if sum(given is not None for given in (options.file, options.node, options.url)) > 1:
        raise UserError("give one of FILE, --node and --url")
    if options.set and options.file is None:
        raise UserError("--set is for a node to start: give its FILE")
    wanted = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    fields: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    key = options.api_key or key_from("RUNTIME_API_KEY")
    if options.file is None:
        yield Conversation(options.url or _url(options.node), options.model, fields, key, options.system)
        return
    with PrivateNode(options.file, options.set, note=lambda text: complain(f"{text} …")) as node:
        yield Conversation(node.url, options.model, fields, node.api_key, options.system)


def _url(node: str | None) -> str:
    run_dir = find_node(node)
    info = read_info(run_dir)
    if info is None or not info.url:
        raise UserError(f"the node {run_dir.name} has no ingress: chat with the node that has it, or give --url")
    return info.url


def _converse(conversation: Conversation) -> None:
    """Prompts and answers, until the user has enough."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called back
    say(f"{conversation.model or conversation.url}. {_HELP}")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say()
            continue
        if prompt == "/exit":
            return
        if prompt == "/clear":
            conversation.clear()
            continue
        if prompt.startswith("/"):
            say(_HELP)
            continue
        if not prompt:
            continue
        try:
            _show(conversation, prompt)
        except KeyboardInterrupt:
            say()
        except UserError as error:
            complain(str(error))


def _show(conversation: Conversation, prompt: str) -> None:
    """One answer, as it comes."""
    with closing(conversation.ask(prompt)) as pieces:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    say()
