"""Limits of JSON that no schema states: how many digits a number has, and how deep an answer nests.

JSON has no end in both, and a small model goes on for ever where it may. At a limit the tokens that would go on are
taken from the mask, if it holds any others: what a schema demands stays possible.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.grammar.tokens import Tokens

Int32s = NDArray[np.int32]

DIGITS, EXPONENT_DIGITS = 17, 3
"""Of a number, and of its fraction; a double has no more."""
LEVELS = 32
"""Of lists and objects in each other."""

_STRUCTURE = frozenset(b'"\\[]{}')


class State(NamedTuple):
    """Where a JSON text is.

    Attributes:
        string: inside a string. escaped: behind its backslash.
        depth: lists and objects that are open.
        digits: of the number, its fraction or its exponent so far, if the text ends with one.
        exponent: these digits are an exponent's.
    """

    string: bool = False
    escaped: bool = False
    depth: int = 0
    digits: int = 0
    exponent: bool = False

    @property
    def full(self) -> bool:
        """No digit more may follow."""
        return not self.string and self.digits >= (EXPONENT_DIGITS if self.exponent else DIGITS)

    @property
    def deep(self) -> bool:
        """No list or object more may be opened."""
        return not self.string and self.depth >= LEVELS

    def after(self, text: bytes) -> State:
        """Where it is with more text."""
        string, escaped, depth, digits, exponent = self
        if string and not escaped and _STRUCTURE.isdisjoint(text):
            return self
        for byte in text:
            if string:
                string, escaped = escaped or byte != 0x22, not escaped and byte == 0x5C
                continue
            if 0x30 <= byte <= 0x39:
                digits += 1
                continue
            exponent = byte in b"eE" or (exponent and byte in b"+-" and not digits)
            digits = 0
            string = byte == 0x22
            depth += (byte in b"[{") - (byte in b"]}")
        return State(string, escaped, depth, digits, exponent)


class Limits:
    """The masks of what goes on.

    Args:
        tokens: of the model.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def apply(self, state: State, mask: Int32s) -> None:
        """Takes tokens from a mask."""
        if state.full:
            self._without(mask, self._digits)
        if state.deep:
            self._without(mask, self._openings)

    @staticmethod
    def _without(mask: Int32s, tokens: Int32s) -> None:
        rest = mask & ~tokens
        if rest.any():
            mask[:] = rest

    @cached_property
    def _digits(self) -> Int32s:
        return self._masked(lambda text: text[:1].isdigit())

    @cached_property
    def _openings(self) -> Int32s:
        return self._masked(lambda text: b"[" in text or b"{" in text)

    def _masked(self, chosen: Callable[[bytes], bool]) -> Int32s:
        bits = np.zeros(-(-self._tokens.vocab_size // 32) * 32, np.uint8)
        bits[[token for token, text in enumerate(self._tokens.texts) if chosen(text)]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)
