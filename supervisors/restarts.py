"""When to restart, and when to give up: restart intensity, back-off, and who is affected by a child's end."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from llm_runtime.supervisors.exits import ExitReason
from llm_runtime.supervisors.spec import Backoff, Restart, Strategy


class Intensity:
    """OTP's restart intensity: more than `limit` restarts within `period_s` seconds are too many."""

    def __init__(self, limit: int, period_s: float) -> None:
        self._limit = limit
        self._period_s = period_s
        self._restarts: deque[float] = deque()

    def add(self, now: float) -> bool:
        """Counts a restart at `now` (seconds); False if it is one too many."""
        self._restarts.append(now)
        while self._restarts[0] < now - self._period_s:
            self._restarts.popleft()
        return len(self._restarts) <= self._limit


class Delay:
    """Back-off of one child, see `spec.Backoff`."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self.quick_crashes = 0
        """In a row, up to now."""

    def next(self, ready_for_s: float) -> float:
        """Seconds to wait after a crash of a process that had been ready for so long (0: never)."""
        backoff = self._backoff
        if ready_for_s * 1000 >= backoff.stable_ms:
            self.quick_crashes = 0
            return 0.0
        self.quick_crashes += 1
        if self.quick_crashes == 1:
            return 0.0
        delay_ms = backoff.base_ms
        for _ in range(self.quick_crashes - 2):
            delay_ms = min(delay_ms * backoff.factor, backoff.cap_ms)
        return min(delay_ms, backoff.cap_ms) * random.uniform(1 - backoff.jitter, 1 + backoff.jitter) / 1000

    @property
    def exhausted(self) -> bool:
        return self.quick_crashes > self._backoff.give_up_after


def wants_restart(restart: Restart, reason: ExitReason) -> bool:
    """Whether a child of this restart type is started again after such an exit that nobody asked for."""
    return restart == "permanent" or (restart == "transient" and reason.abnormal)


def affected(strategy: Strategy, ids: Sequence[str], failed: str) -> Sequence[str]:
    """The siblings to restart with `failed`, itself included, in starting order."""
    if strategy == "one_for_all":
        return ids
    if strategy == "rest_for_one":
        return ids[ids.index(failed) :]
    return [failed]
