"""The order in which waiting requests are admitted: one function a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from llm_runtime.actors.registry import Registry

if TYPE_CHECKING:
    from llm_runtime.actors.scheduler.radix import PrefixTree
    from llm_runtime.actors.scheduler.request import Request

WaitingPolicy: TypeAlias = "Callable[[list[Request], PrefixTree], list[Request]]"
"""Gives the waiting requests, first to be admitted first. It is called once for each step that has room for prompts."""

POLICIES: Registry[WaitingPolicy] = Registry(
    "waiting policy", "llm_runtime.waiting_policies", arguments=("waiting", "tree")
)
LPM_LIMIT = 128
"""With more requests waiting than this, matching all of them against the tree costs more than it saves."""


@POLICIES.register("fcfs")
def fcfs(waiting: list[Request], tree: PrefixTree) -> list[Request]:
    """First come, first served: by priority, then by arrival."""
    return sorted(waiting, key=lambda r: r.urgency)


@POLICIES.register("lpm")
def lpm(waiting: list[Request], tree: PrefixTree) -> list[Request]:
    """Longest prefix match: by priority, then by the longest prefix in the tree, so that prefixes are used before they
    are evicted."""
    if len(waiting) > LPM_LIMIT:
        return fcfs(waiting, tree)
    return sorted(waiting, key=lambda r: (-r.priority, -tree.match_length(r.root, r.tokens.tobytes()), r.order))
