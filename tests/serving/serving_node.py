"""Nodes that serve the embedded model in the background, as a user starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from support import Node, require_model

FLOAT32 = "model.dtype=float32"  # for parity with transformers


def start(base: Path, topology: str, *settings: str) -> Iterator[Node]:
    """A running node; it is stopped afterwards."""
    require_model()
    with Node(base, *settings, topology=topology, detached=True) as node:
        yield node
