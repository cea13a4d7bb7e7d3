"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 60.0
PAUSE_S = 0.005

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str = "it", limit_s: float = DEADLINE_S) -> T:
    """Looks again and again until `look()` is true, and returns that. Fails the test after `limit_s` seconds.

    It waits at least as long as a look takes, so that looking takes half of one core at most.
    """
    deadline = time.monotonic() + limit_s
    while True:
        began = time.monotonic()
        if seen := look():
            return seen
        ended = time.monotonic()
        assert ended < deadline, f"waited in vain for {what}, {limit_s:g} s"
        time.sleep(max(PAUSE_S, ended - began))
