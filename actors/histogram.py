"""Histograms, as actors keep them and report them among their figures."""

from __future__ import annotations

from bisect import bisect_left

# Bucket bounds in seconds: those of SGLang, and some between them.
QUEUE_TIME_BOUNDS: tuple[float, ...] = (
    *(0.000, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1, 2, 3, 4, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90),
    *(100, 200, 300, 400, 500, 600, 700, 800, 900, 1000),
)


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value `times` times."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def figures(self, name: str) -> dict[str, float]:
        """As figures of an actor: the sum, and the counts by the number of their bucket."""
        return {f"{name}:sum": self.sum} | {f"{name}:{i}": float(count) for i, count in enumerate(self.counts)}
