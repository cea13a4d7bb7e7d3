"""The order in which waiting requests are admitted."""

from __future__ import annotations

from typing import Literal

from actors.scheduler.radix import PrefixTree
from actors.scheduler.request import Request

LPM_LIMIT = 128
"""With more requests waiting than this, matching all of them against the tree costs more than it saves."""


def admission_order(waiting: list[Request], policy: Literal["fcfs", "lpm"], tree: PrefixTree) -> list[Request]:
    """The waiting requests, first to be admitted first: by priority, then by the policy.

    fcfs: by arrival. lpm: those with the longest prefix in the tree first, so that prefixes are used before they are
    evicted.
    """
    if policy == "lpm" and len(waiting) <= LPM_LIMIT:
        return sorted(waiting, key=lambda r: (-r.priority, -tree.match_length(r.root, r.tokens.tobytes()), r.order))
    return sorted(waiting, key=lambda r: r.urgency)
