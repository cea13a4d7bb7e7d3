"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through until a stop string is complete.

    The stop string that is complete first wins; of several that are complete with the same character, the first in the
    request's list, as in vLLM. So the result depends on the text alone. (vLLM looks after each token and takes the
    first in the list of all that the token completed, which is the same unless one token completes two stop strings at
    different characters.) Text that may be the beginning of a stop string is held back.

    Args:
        stop: the stop strings, at least one that is not empty; empty ones do not count.
        keep: leave the stop string in the text.
    """

    __slots__ = ("_keep", "_longest", "_stop", "held")

    def __init__(self, stop: Sequence[str], keep: bool) -> None:
        self._stop = tuple(each for each in stop if each)
        self._keep = keep
        self._longest = max(map(len, self._stop))
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes more text. Returns the text that may go out, and the stop string if one is complete."""
        text = self.held + text
        match: tuple[int, int, str] | None = None
        for rank, stop in enumerate(self._stop):
            start = text.find(stop)
            if start >= 0 and (match is None or (start + len(stop), rank) < match[:2]):
                match = (start + len(stop), rank, stop)
        if match is not None:
            end, _, stop = match
            self.held = ""
            return text[: end if self._keep else end - len(stop)], stop
        cut = len(text) - self._beginning(text)
        self.held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text, self.held = self.held, ""
        return text

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        first_place, best = max(0, len(text) - self._longest + 1), len(text)
        for stop in self._stop:
            place = text.find(stop[0], first_place)
            while 0 <= place < best:
                if stop.startswith(text[place:]):
                    best = place
                else:
                    place = text.find(stop[0], place + 1)
        return len(text) - best
