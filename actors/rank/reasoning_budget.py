"""Reasoning in an output: where it ends, and the tokens that end it when its budget is spent.

All of this is a function of the output's tokens. Each of them is looked at once, and again where others have taken its
place: when steps are run again, or guesses were wrong.

Markers are found in the text of the tokens, as the parsers of answers find them, and not by token ids: a vocabulary
without a token for a marker spells it in several ways, and the last token of these may go on behind it (`>` and a
newline). The reasoning ends with the token that completes a marker. Special tokens count with their names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.messages import NewRequest, Thinking

logger = logging.getLogger(__name__)

Int32s = NDArray[np.int32]


class Spelling:
    """A marker as a vocabulary can write it.

    Args:
        token_bytes: the text of each token, by id.
    """

    def __init__(self, marker: bytes, token_bytes: Sequence[bytes]) -> None:
        self._marker = marker
        self._token_bytes = token_bytes

    @cached_property
    def _tokens(self) -> dict[bytes, int]:
        """Tokens that are parts of the marker, by their text."""
        marker = self._marker
        parts = {marker[i:j] for i in range(len(marker)) for j in range(i + 1, len(marker) + 1)}
        return {text: token for token, text in enumerate(self._token_bytes) if text in parts}

    def after(self, text: bytes) -> list[int]:
        """The tokens with which the marker can go on after its first part: the one that is all of it, or else any."""
        left = self._marker.removeprefix(text)
        if left == self._marker and left in self._tokens:
            return [self._tokens[left]]
        return [self._tokens[left[:end]] for end in range(1, len(left) + 1) if left[:end] in self._tokens]


class ReasoningBudget:
    """The reasoning of one slot's output.

    Args:
        thinking: what the request says of it.
        token_bytes: the text of each token, by id. An id beyond them has none.
        spelling: of the first marker.
    """

    def __init__(self, thinking: Thinking, token_bytes: Sequence[bytes], spelling: Spelling) -> None:
        self._start = thinking.start.encode()
        self._ends = [end.encode() for end in thinking.ends]
        self._budget = thinking.budget
        self._closing = thinking.closing
        self._token_bytes = token_bytes
        self._spelling = spelling
        self._reach = max(len(end) for end in self._ends) - 1  # of a marker's bytes, those before its last token's
        self._restart()

    def _restart(self) -> None:
        self._seen = 0  # tokens looked at: no more than it takes to know where the answer begins
        self._begun = None if self._start else 0  # tokens before the reasoning; None until it has begun
        self._rest = b""  # what the token that has completed the first marker says behind it
        self._text = b""  # before the reasoning all of it, then the last `_reach` bytes
        self._stale = False  # `_text` is to be made anew
        self._answer: int | None = None  # tokens before the answer; None until that is known

    def note(self, index: int) -> None:
        """Output tokens from `index` on may be others than before."""
        index = max(index, 0)
        if index >= self._seen:
            return
        if self._begun is None or index < self._begun:
            self._restart()
        else:
            self._seen, self._answer, self._stale = index, None, True

    def follow(self, output: Int32s) -> None:
        """Goes to where the output is, from wherever it was."""
        self.note(len(output))
        while self._answer is None:
            if self._begun is not None and self._budget == self._seen - self._begun:
                self._answer = self._seen + len(self._closing)
            elif self._seen == len(output):
                return
            else:
                self._look(output)

    def forced(self, count: int) -> int | None:
        """The token that must come next, after `count` tokens; None if the output is free. After `follow`."""
        if self._answer is None or not self._seen <= count < self._answer:
            return None
        return self._closing[count - self._seen]

    def answer(self, count: int) -> int | None:
        """How many of the first `count` tokens come before the answer; None if these are all reasoning, and maybe what
        ends it. An output that has yet to show whether it reasons counts as an answer. After `follow`."""
        if self._answer is None:
            return 0 if self._begun is None else None
        return self._answer if count >= self._answer else None

    @property
    def openings(self) -> list[int]:
        """The tokens with which the output may still come to reason, if it has yet to show whether it does. After
        `follow`."""
        undecided = self._begun is None and self._answer is None
        return self._spelling.after(self._text) if undecided else []

    def _look(self, output: Int32s) -> None:
        """At one token more."""
        if self._stale:
            self._text, self._stale = self._before(output), False
        text = self._text + self._spelled(int(output[self._seen]))
        self._seen += 1
        if self._begun is None:
            self._text = text = text.lstrip()
            if not text.startswith(self._start):
                if not self._start.startswith(text):
                    self._answer = 0
                return
            self._begun = self._seen
            self._rest = text = text[len(self._start) :]
        if any(end in text for end in self._ends):
            self._answer = self._seen
        self._text = self._end_of(text)

    def _spelled(self, token: int) -> bytes:
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def _end_of(self, text: bytes) -> bytes:
        """As much of it as a marker that the next token completes may need."""
        return text[max(len(text) - self._reach, 0) :]

    def _before(self, output: Int32s) -> bytes:
        """The last bytes of the reasoning before token `_seen`."""
        assert self._begun is not None
        text, at = b"", self._seen
        while at > self._begun and len(text) < self._reach:
            at -= 1
            text = self._spelled(int(output[at])) + text
        if at == self._begun:
            text = self._rest + text
        return self._end_of(text)


class ReasoningBudgets:
    """The reasoning of slots whose requests say something about it.

    Args:
        load: gives the text of each token, by id; called when it is first needed. May raise CheckpointError.

    Attributes:
        slots: what is known of each.
    """

    def __init__(self, load: Callable[[], Sequence[bytes]]) -> None:
        self.slots: dict[int, ReasoningBudget] = {}
        self._load = load
        self._token_bytes: Sequence[bytes] | None = None
        self._spellings: dict[str, Spelling] = {}

    def open(self, opened: NewRequest) -> None:
        """A slot gets what its request says."""
        self.slots.pop(opened.slot, None)
        thinking = opened.sampling.thinking
        if thinking is None:
            return
        try:
            if self._token_bytes is None:
                self._token_bytes = self._load()
        except CheckpointError as error:  # its checkpoint was there when the node was started
            logger.error("the reasoning of slot %d has no limit: %s", opened.slot, error)
            return
        spelling = self._spellings.get(thinking.start)
        if spelling is None:
            spelling = self._spellings[thinking.start] = Spelling(thinking.start.encode(), self._token_bytes)
        self.slots[opened.slot] = ReasoningBudget(thinking, self._token_bytes, spelling)
