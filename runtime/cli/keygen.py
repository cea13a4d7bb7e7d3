"""`runtime keygen`: make the keys under which several machines talk."""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.keys import write_keys


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, default=Path("transport.keys"), help="(%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if there is one")
    parser.epilog = (
        "example: runtime keygen transport.keys\nEach machine needs the same file, readable by its owner alone."
    )


def run(options: argparse.Namespace) -> int:
    write_keys(options.file, options.force)
    say(f'{options.file} is written; copy it to each machine, and set keys = "{options.file}" under [transport]')
    return 0
