"""One HTTP request between what is journalled of it and what happens now."""

from __future__ import annotations

from llm_runtime.actors.ingress.journal import ReplayState, Slot
from llm_runtime.actors.ingress.output_deltas import Identity, OutputDelta


class Work:
    """The request that a connection is answering.

    Args:
        slot: the connection's journal, None if it has none.
        replay: what an earlier incarnation has journalled of the request.

    Attributes:
        identity: drawn when the request arrived.
        begun: the answer is a stream, and a part of it was sent.
        covered: deltas whose text the answer holds so far.
        trace: context of the trace that the request belongs to; empty if it is not traced.
        old: (choice, delta), what an earlier incarnation has received: if a part was sent, what that part was made from
            comes as a group of its own. Empty for a new request.
    """

    def __init__(self, slot: Slot | None, replay: ReplayState) -> None:
        self._slot = slot
        self._prompts = replay.prompts
        self._attempts = replay.attempts if replay.identity is not None else None
        self.begun = replay.begun
        self.covered = replay.covered
        self.trace = b""
        self.old: list[list[tuple[int, OutputDelta]]] = []
        self._received = len(replay.deltas)
        if replay.identity is not None:
            self.identity = replay.identity
            deltas, covered = replay.deltas, replay.covered
            self.old = [deltas[:covered], deltas[covered:]] if replay.begun else [deltas]
        else:
            self.identity = Identity.draw()
            if slot is not None:
                slot.identity(self.identity)

    @property
    def is_continued(self) -> bool:
        """An earlier incarnation has begun to work on it."""
        return self._attempts is not None

    @property
    def prompts(self) -> list[bytes] | None:
        """Token ids (i32) of the prompts, None before they are known."""
        return self._prompts

    @prompts.setter
    def prompts(self, tokens: list[bytes]) -> None:
        self._prompts = tokens
        if self._slot is not None:
            self._slot.prompts(tokens)

    def next_attempt(self, index: int) -> int:
        """The number under which a choice goes to a scheduler: 0, or above that of an earlier incarnation."""
        if self._attempts is None:
            return 0
        attempt = self._attempts.get(index, 0) + 1
        self.attempted(index, attempt)
        return attempt

    def attempted(self, index: int, attempt: int) -> None:
        """A choice is about to be handed to a scheduler again."""
        if self._slot is not None:
            self._slot.attempt(index, attempt)

    def received(self, index: int, delta: OutputDelta) -> None:
        """A delta of a choice has arrived."""
        self._received += 1
        if self._slot is not None:
            self._slot.delta(index, delta)

    def cover(self) -> None:
        """What is sent next holds all that has arrived."""
        self.covered = self._received
