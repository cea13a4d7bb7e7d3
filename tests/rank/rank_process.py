"""A `Rank` actor in a process of its own, for test_rank_actor: `Rank.run` with a link made of pipes.

Reads one line of JSON from the standard input, {"id", "incarnation", "args", "descriptors"}; shutdown is asked for by
closing it. Prints "ready" or the reason why it is not.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llm_runtime.actors.rank import Rank


class Pipes:
    stats = None

    @property
    def shutdown_fd(self) -> int:
        return 0

    @property
    def shutdown_requested(self) -> bool:
        return bool(select.select([0], [], [], 0)[0])

    def ready(self) -> None:
        print("ready", flush=True)

    def failed(self, reason: str) -> None:
        print(reason, flush=True)

    def doing(self, what: str, limit_s: float | None = None) -> None:
        pass

    def idle(self) -> None:
        pass


def read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    return line


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    fields: dict[str, Any] = json.loads(read_line())
    Rank.run(SimpleNamespace(**fields, run_dir=Path("/"), link=Pipes()))  # type: ignore[arg-type]
