"""The rank: runs the steps of a scheduler on one tensor-parallel part of a model.

`Rank` and executors import torch when they are first asked for; the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_runtime.actors.rank.config import RankConfig
from llm_runtime.actors.rank.shard import kv_bytes_per_token, kv_format, shard_of, weight_bytes

if TYPE_CHECKING:
    from llm_runtime.actors.rank.actor import Rank
    from llm_runtime.actors.rank.executor import Executor, build_executor

__all__ = [
    "Executor",
    "Rank",
    "RankConfig",
    "build_executor",
    "kv_bytes_per_token",
    "kv_format",
    "shard_of",
    "weight_bytes",
]


def __getattr__(name: str) -> object:
    if name == "Rank":
        from llm_runtime.actors.rank.actor import Rank

        return Rank
    if name in ("Executor", "build_executor"):
        from llm_runtime.actors.rank import executor

        return getattr(executor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
