"""The end of a constrained answer that runs out of room: it is closed while there is room for that.

A text is known that would complete the answer. When a drawn token would leave no room for such a text, a token of the
text takes its place. Far from the limit this is not looked at, except at a few places where the known text is compared
with the room: the fewer tokens are left, the closer these places are.

All of this is a function of the request and the output's tokens: the text is found anew at the last such place, and
from there each token changes it in one way.
"""

from __future__ import annotations

from bisect import bisect_left

from llm_runtime.actors.grammar import Compiled, Matcher, Tokens, closing

NEAR = 64
"""Tokens before the limit from which on every token is looked at."""


def _places() -> list[int]:
    places = [NEAR]
    while places[-1] < 2**31:
        places.append(places[-1] + max(8, places[-1] // 8))
    return places


PLACES = _places()
"""Tokens before the limit at which a text is looked for."""


class Room:
    """What is known of one answer's end.

    Args:
        limit: tokens that the whole output may have.
        stop: the token that ends an answer.

    Attributes:
        near: every token is looked at.
    """

    def __init__(self, tokens: Tokens, compiled: Compiled, limit: int, stop: int) -> None:
        self.near = False
        self._tokens = tokens
        self._endings = compiled.endings
        self._limit = limit
        self._stop = stop
        self._shortest = self._text = compiled.shortest
        self._first = 0  # output tokens before the answer
        self._left = limit  # tokens that may still come
        self._place: int | None = None  # output tokens at the last place that was looked at
        self._wanted = 0
        # A shortest answer that is too long stays so.
        self._hopeless = self._text is None or self._cost(self._text) > limit

    def forget(self) -> None:
        """The output is another one than before."""
        self._place = None
        self.near = False

    def unknown(self, count: int, first: int) -> int:
        """How many of the output's `count` tokens must be taken back to come to a place that was not looked at yet.
        0 if there is none, or if it is here. `first` is where the answer begins."""
        self._left, self._first = self._limit - count, first
        if self._hopeless or self._left <= 0:
            return 0
        at = bisect_left(PLACES, self._left)  # the last place on the way here
        self._wanted = max(first, self._limit - PLACES[at])
        return count - self._wanted if self._place != self._wanted else 0

    def look(self, matcher: Matcher, count: int) -> None:
        """Looks for a text, if the output has come to a place with its `count` tokens."""
        if self._hopeless or count != self._wanted or self._place == count:
            return
        self._place = count
        self._text = self._shortest if count == self._first else closing(matcher, self._tokens, self._endings)
        left = self._limit - count
        cost = self._cost(self._text)
        self.near = cost <= left and (left <= NEAR or 2 * cost >= left)

    def accepted(self, matcher: Matcher, token: int) -> None:
        """One token more stands in the output."""
        if self.near:
            self._text = self._after(matcher, token)

    def replaced(self, matcher: Matcher, token: int) -> int | None:
        """The token that must come in place of one that was drawn; None if that one may stay."""
        if not self.near or self._text is None or token == self._stop or self._cost(self._text) > self._left:
            return None
        if matcher.accept(token):
            if matcher.over:
                matcher.rollback(1)
                return None
            after = self._after(matcher, token)
            matcher.rollback(1)
            if self._cost(after) <= self._left - 1:
                return None
        return self._tokens.spell(self._text)[0] if self._text else self._stop

    def _after(self, matcher: Matcher, token: int) -> bytes | None:
        """The text that completes the answer behind a token, which the matcher has accepted."""
        text, said = self._text, self._tokens.texts[token] if token < len(self._tokens.texts) else b""
        if text is not None:
            if text.startswith(said):
                return text[len(said) :]
            if self._completes(matcher, text):
                return text
        return closing(matcher, self._tokens, self._endings)

    def _completes(self, matcher: Matcher, text: bytes) -> bool:
        taken = 0
        spelled = self._tokens.spell(text)
        for token in spelled:
            if not matcher.accept(token):
                break
            taken += 1
        complete = taken == len(spelled) and matcher.complete
        matcher.rollback(taken)
        return complete

    def _cost(self, text: bytes | None) -> int:
        """Tokens of a text and of the end behind it."""
        return 1 << 31 if text is None else len(self._tokens.spell(text)) + 1
