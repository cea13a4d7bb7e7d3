"""Nodes that run as long as a block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llm_runtime.runtime.rundir import base_directory

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def running(name: str, port: int, topology: str, *settings: str) -> Iterator[Path]:
    """The run directory of a node of this name, or of the one that a setting gives it."""
    name = next((each.removeprefix("node.name=") for each in settings if each.startswith("node.name=")), name)
    command = [sys.executable, "-m", "llm_runtime"]
    up = [*command, "up", str(ROOT / "topology" / topology), "--port", str(port), "--detach"]
    for setting in (f"node.name={name}", *settings):
        up += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(up, env=environment, check=True, stdout=subprocess.DEVNULL)
    try:
        yield base_directory() / name
    finally:
        subprocess.run([*command, "down", "--node", name], env=environment, check=False, stdout=subprocess.DEVNULL)
