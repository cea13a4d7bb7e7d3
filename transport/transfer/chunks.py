"""Reads over a network, part by part: so that a read that is stopped is over soon, and its progress can be seen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from llm_runtime.transport.transfer.engine import Piece, TransferFailed
from llm_runtime.transport.transfer.worker import Progress, Reading

Token = TypeVar("Token")


def cut(pieces: Sequence[Piece], most: int) -> Iterator[Piece]:
    """The pieces, those of more than `most` bytes in several."""
    for remote, remote_offset, local, local_offset, length in pieces:
        for done in range(0, length, most):
            yield Piece(remote, remote_offset + done, local, local_offset + done, min(most, length - done))


def grouped(pieces: Iterator[Piece], most: int) -> Iterator[list[Piece]]:
    """The pieces in groups of about `most` bytes."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.length > most:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.length
    if group:
        yield group


class ChunkedReading(Reading, Generic[Token]):
    """A read of which a few chunks are under way at a time.

    Args:
        chunks: what is read at once, in order.
        window: how many are under way at a time.
    """

    def __init__(self, chunks: Iterator[list[Piece]], window: int) -> None:
        self._chunks = chunks
        self._window = window
        self._pending: list[Token] = []

    @abstractmethod
    def _submit(self, chunk: list[Piece]) -> Token:
        """Starts to read a chunk. Raises TransferFailed."""

    @abstractmethod
    def _ended(self, token: Token) -> bool:
        """Whether the chunk has been read. Raises TransferFailed; nothing is written for it any more then."""

    def advance(self) -> Progress:
        moved, failure = False, None
        for token in list(self._pending):
            try:
                if not self._ended(token):
                    continue
            except TransferFailed as failed:
                failure = failed
            self._pending.remove(token)
            moved = True
        if failure is not None:
            raise failure
        while len(self._pending) < self._window:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._pending.append(self._submit(chunk))
            moved = True
        if not self._pending:
            return Progress.DONE
        return Progress.MOVED if moved else Progress.WAITING

    def stop(self) -> bool:
        """Starts nothing more. What is under way cannot be called back: it is waited for."""
        for token in list(self._pending):
            try:
                if self._ended(token):
                    self._pending.remove(token)
            except TransferFailed:
                self._pending.remove(token)
        return not self._pending
