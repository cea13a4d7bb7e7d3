"""What tests of `LLM` and of what shows its processes share."""

from __future__ import annotations

import json
import socket
from typing import Any

from llm_runtime import LLM


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
