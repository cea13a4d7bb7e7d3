"""A KV sender or receiver as a process of its own: `python transfer_actor.py SPEC` stands in for its supervisor.

SPEC is JSON: class ("module:Class"), id, incarnation, run_dir, args, descriptors.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class PipeLink:
    """Its supervisor reads one line when the actor is ready, or has failed to start."""

    def __init__(self) -> None:
        self.stats: Callable[[], dict[str, float]] | None = None
        self.shutdown_requested = False
        self.shutdown_fd = os.eventfd(0)

    def ready(self) -> None:
        print("state: ready", flush=True)

    def failed(self, reason: str) -> None:
        print(f"state: {reason}", flush=True)

    def doing(self, what: str, limit_s: float | None = None) -> None:
        pass

    def idle(self) -> None:
        pass


class SpecContext:
    """What a supervisor would give to the actor."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.id = spec["id"]
        self.incarnation = spec["incarnation"]
        self.args = spec["args"]
        self.descriptors = spec["descriptors"]
        self.run_dir = Path(spec["run_dir"])
        self.link = PipeLink()


def main() -> None:
    spec = json.loads(sys.argv[1])
    module, _, name = spec["class"].partition(":")
    try:
        getattr(importlib.import_module(module), name).run(SpecContext(spec))
    finally:
        sys.stdout.flush()
        os._exit(1)


class StartFailed(Exception):
    """The actor says why it cannot be started."""


def start(spec: Mapping[str, Any]) -> subprocess.Popen[str]:
    """The process, when its actor is ready. Raises StartFailed."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(spec)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        pass_fds=list(spec["descriptors"].values()),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("state: "):
            state = line.removeprefix("state: ").strip()
            if state == "ready":
                return process
            kill(process)
            raise StartFailed(state)
    raise AssertionError(f"{spec['id']} has ended with {process.wait()}")


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    main()
