"""`runtime models`: what can be served from this machine without a download, and what comes with the runtime."""

from __future__ import annotations

import argparse
import json

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.models import local_models


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.epilog = "example: runtime models"


def run(options: argparse.Namespace) -> int:
    models = local_models()
    if options.json:
        say(json.dumps(msgspec.to_builtins(models), indent=2))
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("MODEL", "SIZE", "WHERE"):
        table.add_column(title, overflow="fold", justify="right" if title == "SIZE" else "left")
    for model in models:
        size = f"{model.bytes / 1e6:,.0f} MB" if model.path else ""
        table.add_row(Text(model.name), size, Text(model.path or f"not here yet: {model.remedy}"))
    Console(highlight=False).print(table)
    say("\nServe one with `runtime serve MODEL`. A directory, a GGUF file or another Hugging Face id does as well.")
    return 0
