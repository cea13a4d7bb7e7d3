"""Prompt lookup: what followed a request's last tokens earlier in its prompt or output is guessed to follow again.

The method is Saxena's prompt lookup decoding (2023), `ngram` in vLLM and SGLang. A guess is checked against each token
that arrives, whether or not a rank was asked to verify it, so how far guesses can be trusted is known without a cost.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from llm_runtime.actors.scheduler.drafters.base import DRAFTERS, Drafter

if TYPE_CHECKING:
    from llm_runtime.actors.scheduler.config import Config

MAX_CANDIDATES = 8
"""Earlier places that are compared with the last tokens, the nearest first; the longest match is followed."""
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
"""How often a guess after a match of 0, 1, 2–3, 4–7, 8–15, 16 or more tokens is expected to be right at first."""
RATE_WEIGHT = 2.0
"""Guesses that this expectation counts as."""
MEMORY = 0.95
"""Weight of what has been seen, with each further guess."""


@DRAFTERS.register("ngram")
class NgramDrafter(Drafter):
    """An index of one request's n-grams, and the earlier place that its last tokens are following at present.

    A token costs a dictionary entry, and at most `MAX_CANDIDATES` short comparisons while nothing long is followed.
    A match has `prompt_lookup_min` tokens at least; from `prompt_lookup_max` on one counts as good as any other.
    """

    __slots__ = ("_before", "_hits", "_last", "_longest", "_place", "_rates", "_shortest", "matched", "tokens")

    def __init__(self, tokens: array[int], config: Config) -> None:
        self.tokens = tokens
        self._shortest, self._longest = config.prompt_lookup_min, config.prompt_lookup_max
        self._last: dict[bytes, int] = {}  # n-gram → the position behind its last occurrence
        self._before = array("i", [0])  # by the position behind an n-gram: that of its occurrence before, or 0
        self._place = 0  # the token there is the guess for the next one; 0 when there is none
        self.matched = 0
        self._hits = [(rate * RATE_WEIGHT, RATE_WEIGHT) for rate in RATES]  # right guesses, and all
        self._rates = list(RATES)
        self._index()
        self._find(len(tokens))

    @property
    def rate(self) -> float:
        """See `Drafter.rate`."""
        return self._rates[_length_class(self.matched)]

    def follow(self) -> None:
        """See `Drafter.follow`."""
        tokens, n, last, before = self.tokens, self._shortest, self._last, self._before
        for end in range(len(before), len(tokens) + 1):
            right = False
            if self._place:
                right = tokens[self._place] == tokens[end - 1]
                self._learn(right)
            ngram = tokens[max(0, end - n) : end].tobytes()  # shorter ones, at the beginning, are never found
            earlier = last.get(ngram, 0)
            before.append(earlier)
            last[ngram] = end
            if right:
                self._place += 1
                self.matched += 1
                if self.matched >= self._longest:
                    continue
            self._place = self.matched = 0
            if earlier:
                self._find(end)

    def chances(self, count: int) -> list[float]:
        """See `Drafter.chances`."""
        if not self.matched:
            return []
        chance, chances = 1.0, []
        for length in range(self.matched, self.matched + count):
            chance *= self._rates[_length_class(length)]
            chances.append(chance)
        return chances

    def guess(self, count: int) -> tuple[int, ...]:
        """See `Drafter.guess`. Guesses go round where the match reaches the end: a loop is taken to go on."""
        place, end = self._place, len(self.tokens)
        known = self.tokens[place : place + count].tolist()
        return tuple(known[i % (end - place)] for i in range(count))

    def _index(self) -> None:
        """Enters the n-grams of all tokens."""
        n, last, before, packed = self._shortest, self._last, self._before, self.tokens.tobytes()
        before.extend([0] * min(n - 1, len(self.tokens)))
        for end in range(n, len(self.tokens) + 1):
            ngram = packed[4 * (end - n) : 4 * end]
            before.append(last.get(ngram, 0))
            last[ngram] = end

    def _find(self, end: int) -> None:
        """Looks for the place that the tokens before `end` follow: the longest match, the latest of equal ones."""
        tokens, longest, place = self.tokens, self._longest, self._before[end]
        for _ in range(MAX_CANDIDATES):
            if not place:
                return
            length = self._shortest
            while length < longest and length < place and tokens[place - 1 - length] == tokens[end - 1 - length]:
                length += 1
            if length > self.matched:
                self._place, self.matched = place, length
            if length >= longest:
                return
            place = self._before[place]

    def _learn(self, right: bool) -> None:
        kind = _length_class(self.matched)
        hits, trials = self._hits[kind]
        hits, trials = MEMORY * hits + right, MEMORY * trials + 1
        self._hits[kind] = hits, trials
        self._rates[kind] = hits / trials


def _length_class(matched: int) -> int:
    return min(matched.bit_length(), len(RATES) - 1)
