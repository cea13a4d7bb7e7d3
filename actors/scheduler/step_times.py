"""How long steps take by their size, as measured: what the sizes of later steps are chosen by."""

from __future__ import annotations

import math


class StepTimes:
    """How long a step takes by the number of its new tokens, as measured.

    Sizes are put together by powers of two; between those seen, times are interpolated.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, int]] = {}  # by bit length: mean tokens, mean seconds, steps
        self._points: list[tuple[float, float]] = []

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with so many new tokens took so long."""
        size = tokens.bit_length()
        mean_tokens, mean_seconds, count = self._seen.get(size, (0.0, 0.0, 0))
        if self._points and self._points[0][0] <= tokens <= self._points[-1][0]:
            # One that takes much longer than expected had to wait for the processor, and says little.
            seconds = min(seconds, 2 * (mean_seconds or self.seconds(tokens)))
        weight = max(0.1, 1 / (count + 1))
        mean_tokens += weight * (tokens - mean_tokens)
        mean_seconds += weight * (seconds - mean_seconds)
        self._seen[size] = mean_tokens, mean_seconds, count + 1
        self._points = sorted((at, mean) for at, mean, _ in self._seen.values())

    def seconds(self, tokens: int) -> float:
        """What a step of this size is expected to take; 0 when nothing is known."""
        low: tuple[float, float] | None = None
        for high in self._points:
            if tokens <= high[0]:
                if low is None:
                    return high[1]
                return low[1] + (high[1] - low[1]) * (tokens - low[0]) / (high[0] - low[0])
            low = high
        if low is None:
            return 0.0
        # Larger than all seen. Between a step bound by memory, where further tokens are free, and one bound by work.
        return low[1] * math.sqrt(tokens / low[0])

    def most_tokens(self, seconds: float, most: int) -> int:
        """The largest size up to `most` that is expected to take at most so long; 0 if there is none."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low
