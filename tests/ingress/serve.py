"""Runs the real ingress actor in a process of its own, with a small stand-in for the supervisor's link.

Started as `python serve.py ARGUMENTS` where ARGUMENTS is a JSON object: id, incarnation, args, listener (descriptor),
shutdown (descriptor that becomes readable when the actor is to end), run_dir. Prints "ready".
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_runtime.actors.ingress import Ingress
from llm_runtime.actors.ingress.journal import slot_bytes
from llm_runtime.transport import Arena


class Link:
    """Says what the supervisor would be told on standard output."""

    def __init__(self, shutdown_fd: int) -> None:
        self.stats: Callable[[], dict[str, float]] | None = None
        self.shutdown_fd = shutdown_fd

    @property
    def shutdown_requested(self) -> bool:
        return bool(select.select([self.shutdown_fd], [], [], 0)[0])

    def ready(self) -> None:
        print("ready", flush=True)

    def failed(self, reason: str) -> None:
        print(f"failed: {reason}", flush=True)

    def doing(self, what: str, limit_s: float | None = None) -> None:
        assert limit_s is not None

    def idle(self) -> None:
        pass

    def store_fd(self, name: str, fd: int, meta: bytes = b"") -> None:
        pass

    def remove_fd(self, name: str) -> None:
        pass


class Context:
    """What the supervisor gives to the actor."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.id: str = arguments["id"]
        self.incarnation: int = arguments["incarnation"]
        self.args: dict[str, Any] = arguments["args"]
        journal = f"{self.id}.journal"
        self.descriptors: Mapping[str, int] = {
            **arguments["descriptors"],
            journal: Arena.create(journal, 64 * slot_bytes(8 * 2**20)),
        }
        self.stored_fds: Mapping[str, tuple[int, bytes]] = {}
        self.run_dir = Path(arguments["run_dir"])
        self.link = Link(arguments["shutdown"])


if __name__ == "__main__":
    Ingress.run(Context(json.loads(sys.argv[1])))
