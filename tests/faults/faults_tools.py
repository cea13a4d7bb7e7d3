"""Nodes that serve the embedded model in deterministic mode, to be killed in parts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

from support import Node, require_model

from llm_runtime.runtime.chaos.client import Answer
from llm_runtime.runtime.chaos.inject import Plan, Planned
from llm_runtime.runtime.chaos.run import Load, Outcome, run_chaos

SETTINGS = (
    "model.dtype=float32",
    "model.deterministic=true",
    "engine.main.kv_tokens=640",
    "engine.main.chunk_tokens=128",
    "supervision.heartbeat_timeout_s=1.5",
    "supervision.intensity=1000",
)
LOAD = Load(streams=6, tokens=12, long_words=120, timeout_s=90.0)


class DisturbedNode(Node):
    """A node of the embedded model in the foreground, to be killed in parts."""

    def __init__(self, base: Path, *settings: str, topology: str = "smollm2.toml") -> None:
        require_model()
        super().__init__(base, *SETTINGS, *settings, topology=topology)
        self.wanted: dict[Load, list[Answer]] = {}

    def disturb(
        self, schedule: Sequence[tuple[float, str, str]] = (), plan: Plan | None = None, load: Load = LOAD
    ) -> Outcome:
        """A chaos run. The undisturbed answers are those of the node's first one with the same load."""
        planned = [Planned(after_s, actor, signal.Signals[f"SIG{name}"]) for after_s, actor, name in schedule]
        outcome = asyncio.run(
            run_chaos(self.run_dir, load, plan or Plan(schedule=planned), wanted=self.wanted.get(load))
        )
        self.wanted[load] = outcome.answers
        assert outcome.deterministic
        return outcome


def assert_unnoticed(outcome: Outcome) -> None:
    """No request failed, no token was lost, repeated or changed."""
    assert outcome.failures == []
    assert not outcome.difference.any, outcome.difference
    assert outcome.settled
    assert outcome.requests >= 1
