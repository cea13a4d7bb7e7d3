"""The last ten minutes of the node's figures, for the status page: one point a second, from what actors report anyway.

It is soft: a new incarnation of the worker begins with an empty one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_runtime.actors.histogram import QUEUE_TIME_BOUNDS
from llm_runtime.actors.ingress.metrics import HISTOGRAMS, QUEUE_TIME, figures_of_models, responses_of

KEPT = 600
WINDOW = 60
"""Quantiles are those of so many points."""
FORGET_AFTER_S = 3.0
"""An actor that has not reported for so long counts no more as running or holding anything."""

TIMES: dict[str, tuple[str, tuple[float, ...]]] = {
    "ttft": ("time_to_first_token_seconds", HISTOGRAMS["time_to_first_token_seconds"][1]),
    "itl": ("inter_token_latency_seconds", HISTOGRAMS["inter_token_latency_seconds"][1]),
    "queue": (QUEUE_TIME, QUEUE_TIME_BOUNDS),
    "e2e": ("e2e_request_latency_seconds", HISTOGRAMS["e2e_request_latency_seconds"][1]),
}
PARTS = {"p50": 0.5, "p99": 0.99}
COUNTED = {"tokens": "generation_tokens", "requests": "num_requests", "aborted": "num_aborted_requests"}
HELD = {
    "running": "num_running_reqs",
    "waiting": "num_queue_reqs",
    "kv_used": "num_used_tokens",
    "kv_total": "max_total_num_tokens",
}
_OF_INTEREST = frozenset(("connections_lost", QUEUE_TIME + ":sum", *HELD.values()))
"""Actors with any of these are ingress workers and schedulers."""
NAMES = ("seconds", *COUNTED, "errors", *HELD, *(f"{name}_{part}" for name in TIMES for part in PARTS))
"""What a point holds after its time: how long it lasted, counts, what was held at its end, and times in seconds."""


class _Point(NamedTuple):
    """About a second. `counts`: of each histogram of TIMES, the values in each bucket."""

    at: float
    values: list[float | None]
    counts: dict[str, list[float]]
    responses: dict[str, float]


class History:
    """Points, the newest last."""

    def __init__(self) -> None:
        self._points: deque[_Point] = deque(maxlen=KEPT)
        self._before: dict[str, dict[str, float]] = {}

    def add(self, at: float, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Takes in the figures of the actors that have reported lately, by their name.

        Args:
            at: unix time in seconds.
        """
        grown: dict[str, float] = {}
        held = dict.fromkeys(HELD, 0.0)
        for actor, each in figures.items():
            if _OF_INTEREST.isdisjoint(each):
                continue
            now = figures_of_models(each) | responses_of(each)
            now |= {name: value for name, value in each.items() if name.startswith(QUEUE_TIME)}
            before = self._before.get(actor)
            self._before[actor] = now
            for name, source in HELD.items():
                held[name] += each.get(source, 0.0)
            for name, value in now.items() if before is not None else ():
                since = value - before.get(name, 0.0)  # type: ignore[union-attr]
                if since := since if since >= 0 else value:  # it has begun anew
                    grown[name] = grown.get(name, 0.0) + since
        counts = {
            name: [grown.get(f"{metric}:{i}", 0.0) for i in range(len(bounds) + 1)]
            for name, (metric, bounds) in TIMES.items()
        }
        responses = {name.partition(":")[2]: value for name, value in grown.items() if name.startswith("http_")}
        seconds = max(0.001, at - self._points[-1].at) if self._points else 1.0
        values: list[float | None] = [round(seconds, 3), *(grown.get(source, 0.0) for source in COUNTED.values())]
        values += [sum(value for status, value in responses.items() if status >= "400"), *held.values()]
        for name, (_, bounds) in TIMES.items():
            values += _quantiles(counts[name], bounds)
        self._points.append(_Point(at, values, counts, responses))

    def points(self, since: float) -> list[list[float | None]]:
        """The points after a time: unix time in seconds, then what NAMES says; None where there is nothing to tell."""
        return [[round(point.at, 2), *point.values] for point in self._points if point.at > since + 0.005]

    def times(self) -> dict[str, float | None]:
        """Quantiles of the last WINDOW points, by the names in NAMES."""
        points = list(self._points)[-WINDOW:]
        found: dict[str, float | None] = {}
        for name, (_, bounds) in TIMES.items():
            counts = [sum(column) for column in zip(*(point.counts[name] for point in points), strict=True)]
            found |= dict(zip((f"{name}_{part}" for part in PARTS), _quantiles(counts, bounds), strict=True))
        return found

    def responses(self) -> dict[str, Any]:
        """HTTP answers by status, in the last WINDOW points and in all that are kept."""
        return {
            "last_minute": _sum(point.responses for point in list(self._points)[-WINDOW:]),
            "kept": _sum(point.responses for point in self._points),
        }


def _quantiles(counts: Sequence[float], bounds: Sequence[float]) -> list[float | None]:
    """The quantiles of PARTS; within a bucket values count as evenly spread."""
    total = sum(counts)
    if not total:
        return [None] * len(PARTS)
    found: list[float | None] = []
    for part in PARTS.values():
        below = lower = 0.0
        for count, bound in zip(counts, [*bounds, math.inf], strict=True):
            if count and below + count >= part * total:
                upper = lower if math.isinf(bound) else bound
                lower += (upper - lower) * (part * total - below) / count
                break
            below, lower = below + count, lower if math.isinf(bound) else bound
        found.append(round(lower, 6))
    return found


def _sum(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in each:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return dict(sorted(total.items()))
