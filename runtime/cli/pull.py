"""`runtime pull`: download a model, so that its first start need not."""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.display import Display
from llm_runtime.runtime.models import resolve_model
from llm_runtime.runtime.progress import notes_to


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face id, or a name that `runtime models` lists")
    parser.epilog = "examples:\n  runtime pull Qwen/Qwen3-0.6B\n  runtime pull smollm2-135m-instruct"


def run(options: argparse.Namespace) -> int:
    display = Display()
    try:
        model = resolve_model(options.model, Path.cwd(), note=notes_to(display.show))
    finally:
        display.close()
    say(f"{model.name} is at {model.path}")
    return 0
