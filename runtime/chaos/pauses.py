"""How long clients wait because of a fault.

The gap between two pieces of a stream belongs to the first fault within it, or else to the last fault up to
`WINDOW_S` before it. The pause of a fault is its longest gap, of all streams, less the typical gap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median

WINDOW_S = 2.0
STOPPED_WINDOW_S = 8.0
"""For a process that was stopped and not killed: its silence has to be noticed first."""


def typical_gap(streams: Iterable[Sequence[float]]) -> float:
    """Median time between two pieces of a stream, in seconds; 0 if there are none."""
    gaps = [later - earlier for times in streams for earlier, later in pairwise(times)]
    return median(gaps) if gaps else 0.0


def longest_gaps(
    faults: Sequence[float], streams: Iterable[Sequence[float]], window_s: float = WINDOW_S
) -> list[float | None]:
    """The longest gap that belongs to each fault; None where no stream was flowing.

    Args:
        faults: times of the faults, in order.
        streams: for each stream when its pieces arrived, by the same clock.
    """
    longest: list[float | None] = [None] * len(faults)
    for times in streams:
        for begin, end in pairwise(times):
            index = bisect_left(faults, begin)
            if index == len(faults) or faults[index] > end:  # none within the gap
                index = bisect_right(faults, begin) - 1
                if index < 0 or begin - faults[index] > window_s:
                    continue
            known = longest[index]
            longest[index] = end - begin if known is None else max(known, end - begin)
    return longest


def pauses(
    faults: Sequence[float], streams: Sequence[Sequence[float]], typical_s: float, window_s: float = WINDOW_S
) -> list[float | None]:
    """The pause of each fault in seconds, at least 0; None where no stream was flowing."""
    return [None if gap is None else max(0.0, gap - typical_s) for gap in longest_gaps(faults, streams, window_s)]
