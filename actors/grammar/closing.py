"""The way to the end of an answer: a short text that completes it, found by trying what the masks allow.

The search prefers what closes JSON. It goes back only over one token, so it is quick, and it does not find every end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.grammar.backends.base import Matcher
from llm_runtime.actors.grammar.tokens import Tokens

Int32s = NDArray[np.int32]

MAX_BYTES = 2048
MAX_TRIED = 1500
"""Tokens that a search tries in all."""
ENDINGS_TRIED = 4
"""How often endings are tried at places that look the same."""
OTHER = 8
"""How often a search goes the same way from one place until it takes another one."""
TRIED = 12
"""Tokens tried at one place before it goes on in a circle."""
_LAST = b"-+,[{\\"
_ORDER = b'"}])>;' + b"0123456789" + bytes(range(ord("a"), ord("z") + 1))
_PREFERENCE = _ORDER + bytes(b for b in b"\n\t" + bytes(range(32, 127)) if b not in _ORDER + _LAST) + _LAST


def closing(matcher: Matcher, tokens: Tokens, endings: Sequence[bytes] = (), most: int = MAX_BYTES) -> bytes | None:
    """A text that completes the answer from where the matcher is, which it comes back to. None if none was found.

    Args:
        endings: texts that may complete it, or strings in it, where the masks do not show which do; or the ends of
            such texts.
        most: bytes that the text may have.
    """
    search = _Search(matcher, tokens, endings)
    text = bytearray()
    taken = 0
    while not matcher.complete and len(text) <= most:
        step = search.step()
        if not step:
            break
        taken += len(step)
        text += b"".join(tokens.texts[token] for token in step)
    found = matcher.complete
    matcher.rollback(taken)
    return bytes(text) if found else None


class _Search:
    """Places are told apart by their masks. A place at which the search is again may be another one, behind one
    character more of so many, or the same one, in a circle: there it tries what it has not tried there yet."""

    def __init__(self, matcher: Matcher, tokens: Tokens, endings: Sequence[bytes]) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._endings = endings
        self._mask = np.zeros(-(-tokens.vocab_size // 32), np.int32)
        self._untried: dict[bytes, Iterator[int]] = {}  # by place
        self._known: dict[bytes, list[int]] = {}  # by place, what may come next there
        self._without_ending: Counter[bytes] = Counter()  # by place, how often no ending fitted
        self._visits: Counter[bytes] = Counter()  # by place, once nothing there is new
        self._tried = 0

    def step(self) -> list[int]:
        """Accepts some tokens; none where the search ends."""
        forced = self._tokens.spell(self._matcher.forced())
        step = forced[: self._accepted(forced)]
        return step or self._chosen(self._place())

    def _place(self) -> bytes:
        self._matcher.fill(self._mask)
        place = self._mask.tobytes()
        if place not in self._untried:
            self._untried[place] = self._candidates(self._mask.copy())
        return place

    def _chosen(self, here: bytes) -> list[int]:
        """A token that leads where the search has not been yet; else an ending; else any token."""
        for _, token in zip(range(TRIED), self._untried[here], strict=False):
            self._tried += 1
            if self._tried > MAX_TRIED:
                return []
            if not self._matcher.accept(token):
                continue
            self._known.setdefault(here, []).append(token)
            self._matcher.fill(self._mask)
            if self._matcher.complete or self._mask.tobytes() not in self._untried:
                return [token]
            self._matcher.rollback(1)
        known = self._known.get(here, [])
        if self._without_ending[here] < ENDINGS_TRIED:
            quote = bool(known) and self._tokens.texts[known[0]] == b'"'  # it ends a string, or begins one
            if ending := self._ending([each for each in self._endings if not (quote and each.endswith(b'"'))]):
                return ending
            self._without_ending[here] += 1
        self._visits[here] += 1
        turn, now = divmod(self._visits[here], OTHER)
        token = known[0 if now else turn % len(known)] if known else -1
        return [token] if token >= 0 and self._matcher.accept(token) else []

    def _ending(self, endings: Sequence[bytes]) -> list[int]:
        """Accepts an ending, or else the shortest end of one that completes the answer or a string."""
        for ending in endings:
            spelled = self._tokens.spell(ending)
            if spelled and self._accepts(spelled):
                return spelled
        for ending in endings:
            for start in range(len(ending) - 2, 0, -1):  # a quote alone would begin a string
                spelled = self._tokens.spell(ending[start:])
                if spelled and self._accepts(spelled):
                    if ending.endswith(b'"') or self._matcher.complete:
                        return spelled
                    self._matcher.rollback(len(spelled))
        return []

    def _accepts(self, tokens: Sequence[int]) -> bool:
        """Accepts all of the tokens, or none."""
        count = self._accepted(tokens)
        if count < len(tokens):
            self._matcher.rollback(count)
        return count == len(tokens)

    def _accepted(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, one after the other, were accepted."""
        for count, token in enumerate(tokens):
            if not self._matcher.accept(token):
                return count
        return len(tokens)

    def _candidates(self, mask: Int32s) -> Iterator[int]:
        """Tokens that the mask allows: those of one plain character by preference, or else the shortest one."""
        found = False
        for byte in _PREFERENCE:
            spelled = self._tokens.spell(bytes([byte]))
            if spelled and mask[spelled[0] >> 5] >> (spelled[0] & 31) & 1:
                found = True
                yield spelled[0]
        if not found:
            bits = np.unpackbits(mask.view(np.uint8), count=self._tokens.vocab_size, bitorder="little")
            texts = self._tokens.texts
            written = [token for token in np.flatnonzero(bits).tolist() if token < len(texts) and texts[token]]
            if written:
                yield min(written, key=lambda token: (len(texts[token]), token))
