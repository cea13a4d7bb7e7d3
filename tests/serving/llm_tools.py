"""What tests of `LLM` and of what shows its processes share."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime import LLM

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
DEADLINE_S = 60.0


def private_tree(llm: LLM) -> dict[str, dict[str, Any]]:
    """The processes of an LLM by name."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as stream:
        connection.settimeout(10)
        connection.connect(str(llm.node.directory / "llm" / "status"))
        connection.sendall(b"status\n")
        nodes = [json.load(stream)["tree"]]
    for node in nodes:
        nodes += node["children"]
    return {node["name"]: node for node in nodes}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Fails when a condition does not come true in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
