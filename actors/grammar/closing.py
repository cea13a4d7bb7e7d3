"""The way to the end of an answer: a short text that completes it, found by trying what the masks allow.

The search prefers what closes JSON. It goes back only over one token, so it is quick, and it does not find every end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.grammar.backends.base import Matcher
from actors.grammar.tokens import Tokens

Int32s = NDArray[np.int32]

MAX_BYTES = 2048
MAX_TRIED = 1500
"""Tokens that a search tries in all."""
TRIED = 12
"""Tokens tried at one place before it goes on in a circle."""
_LAST = b"-+,[{\\"
_ORDER = b'"}])>;' + b"0123456789" + bytes(range(ord("a"), ord("z") + 1))
_PREFERENCE = _ORDER + bytes(b for b in b"\n\t" + bytes(range(32, 127)) if b not in _ORDER + _LAST) + _LAST


def closing(matcher: Matcher, tokens: Tokens, endings: Sequence[bytes] = (), most: int = MAX_BYTES) -> bytes | None:
    """A text that completes the answer from where the matcher is, which it comes back to. None if none was found.

    Args:
        endings: texts that may complete it, where the masks do not show which do.
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
        self._endings = [spelled for spelled in map(tokens.spell, endings) if spelled]
        self._mask = np.zeros(-(-tokens.vocab_size // 32), np.int32)
        self._untried: dict[bytes, Iterator[int]] = {}  # by place
        self._first: dict[bytes, int] = {}  # by place, what may always come next there
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
            self._first.setdefault(here, token)
            self._matcher.fill(self._mask)
            if self._matcher.complete or self._mask.tobytes() not in self._untried:
                return [token]
            self._matcher.rollback(1)
        for ending in self._endings:
            count = self._accepted(ending)
            if count == len(ending):
                return ending
            self._matcher.rollback(count)
        token = self._first.get(here, -1)
        return [token] if token >= 0 and self._matcher.accept(token) else []

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
