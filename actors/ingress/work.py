"""One HTTP request between what is journalled of it and what happens now."""

from __future__ import annotations

from llm_runtime.actors.ingress.journal import Past, Slot
from llm_runtime.actors.ingress.pieces import Identity, Piece


class Work:
    """The request that a connection is answering.

    Args:
        slot: the connection's journal, None if it has none.
        past: what an earlier incarnation has journalled of the request.

    Attributes:
        identity: drawn when the request arrived.
        begun: the answer is a stream, and a part of it was sent.
        covered: pieces whose text the answer holds so far.
        trace: context of the trace that the request belongs to; empty if it is not traced.
        old: (choice, piece), what an earlier incarnation has received: if a part was sent, what that part was made from
            comes as a group of its own. Empty for a new request.
    """

    def __init__(self, slot: Slot | None, past: Past) -> None:
        self._slot = slot
        self._prompts = past.prompts
        self._attempts = past.attempts if past.identity is not None else None
        self.begun = past.begun
        self.covered = past.covered
        self.trace = b""
        self.old: list[list[tuple[int, Piece]]] = []
        self._received = len(past.pieces)
        if past.identity is not None:
            self.identity = past.identity
            self.old = [past.pieces[: past.covered], past.pieces[past.covered :]] if past.begun else [past.pieces]
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

    def received(self, index: int, piece: Piece) -> None:
        """A piece of a choice has arrived."""
        self._received += 1
        if self._slot is not None:
            self._slot.piece(index, piece)

    def cover(self) -> None:
        """What is sent next holds all that has arrived."""
        self.covered = self._received
