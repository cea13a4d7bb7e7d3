"""An engine that moves nothing: for memory that both sides share, and for measuring all that is around a transfer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from llm_runtime.transport.transfer.engine import Piece, Region


class NoTransfer:
    """Every read has ended, without an error, as soon as it has begun."""

    def __init__(self) -> None:
        self._handles = itertools.count(1)
        self._ended: list[int] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def register(self, regions: Sequence[Region]) -> None:
        """Needs to know nothing."""

    def endpoint(self) -> bytes:
        """Empty: there is nowhere to go."""
        return b""

    def read(self, endpoint: bytes, pieces: Sequence[Piece]) -> int:
        """Ends at once."""
        handle = next(self._handles)
        self._ended.append(handle)
        os.eventfd_write(self._wake, 1)
        return handle

    def poll(self) -> list[tuple[int, str]]:
        """The reads since the last call."""
        if not self._ended:
            return []
        os.eventfd_read(self._wake)
        ended, self._ended = self._ended, []
        return [(handle, "") for handle in ended]

    def cancel(self, handle: int) -> None:
        """There is nothing left to cancel."""

    def fileno(self) -> int:
        """See `TransferEngine.fileno`."""
        return self._wake

    def close(self) -> None:
        """See `TransferEngine.close`."""
        os.close(self._wake)
