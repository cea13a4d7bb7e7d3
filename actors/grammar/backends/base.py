"""What a grammar backend does: compile constraints, and say which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.grammar.tokens import Tokens
from llm_runtime.actors.messages import Constraint

Int32s = NDArray[np.int32]


class Matcher(Protocol):
    """Follows one answer.

    Attributes:
        stops: ids that may follow a complete answer.
        complete: the answer may end here. over: a stop token has ended it.
        limited: `fill` leaves out tokens here that `accept` takes.
    """

    stops: list[int]

    @property
    def complete(self) -> bool: ...

    @property
    def over(self) -> bool: ...

    @property
    def limited(self) -> bool: ...

    def accept(self, token: int) -> bool:
        """Takes the next token. False, and nothing happens, if it is not allowed."""

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens."""

    def fill(self, mask: Int32s) -> None:
        """Which tokens may come next: one bit each. No bit if the backend can go no further."""

    def forced(self) -> bytes:
        """A text that must come next; empty if there is a choice, or if the backend does not know."""


class Compiled(Protocol):
    """A constraint over a model's tokens.

    Attributes:
        size: bytes that it holds, roughly.
        endings: texts after which an answer may be complete, where they cannot be seen in masks.
        shortest: a short text that completes an answer from its beginning; None if none was found.
    """

    size: int
    endings: Sequence[bytes]

    @property
    def shortest(self) -> bytes | None:
        """Found when it is first asked for, which takes milliseconds."""

    def matcher(self, stops: list[int]) -> Matcher:
        """At the beginning of an answer."""


class Backend(Protocol):
    """Compiles for one vocabulary. May be used by several threads at once."""

    tokens: Tokens

    def compile(self, constraint: Constraint) -> Compiled:
        """Raises BadGrammar if the constraint makes no sense, allows nothing, is too large, or cannot be kept."""

    def fill(self, matchers: list[Matcher], masks: Int32s, rows: list[int]) -> None:
        """Fills rows of masks [B, words]."""
