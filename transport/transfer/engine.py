"""What all transfer engines have in common: the interface, and the records that go through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_ENDPOINT_BYTES = 65_536


class TransferUnavailable(Exception):
    """The engine cannot be made here. One sentence that says what to install or to set."""


class TransferFailed(Exception):
    """A read has failed. One sentence that says why."""


class TransferStuck(RuntimeError):
    """A read that is over by its time cannot be stopped. What the process still writes ends only with the process."""


class Region(NamedTuple):
    """Memory to be read from or written to. The name says to processes of the same node which memory it is."""

    name: str
    buffer: memoryview


class Piece(NamedTuple):
    """A run of bytes to read: from an offset of one of the peer's regions to an offset of one of the own.

    Regions are known by their number in `register`.
    """

    remote_region: int
    remote_offset: int
    local_region: int
    local_offset: int
    length: int


class TransferEngine(Protocol):
    """Reads from the memory of other processes. For one thread; none of the calls waits for a peer."""

    def register(self, regions: Sequence[Region]) -> None:
        """Makes memory known, once, before anything else is called. Peers may read it, own reads write into it.

        Raises TransferUnavailable when the system refuses.
        """

    def endpoint(self) -> bytes:
        """What a peer's `read` needs to reach the registered regions, at most `MAX_ENDPOINT_BYTES`."""

    def read(self, endpoint: bytes, pieces: Sequence[Piece]) -> int:
        """Starts to read; the handle of what was started. All errors come out of `poll`."""

    def poll(self) -> list[tuple[int, str]]:
        """The reads that have ended since the last call, each with "" or a sentence that says what was wrong.

        A read ends within a bounded time, whatever its peer does. When it has ended nothing is written for it any
        more. Raises TransferStuck if that cannot be brought about: the process has to end then.
        """

    def cancel(self, handle: int) -> None:
        """Asks for an early end of a read, which comes out of `poll` like any other. Unknown handles are ignored."""

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to `poll`."""

    def close(self) -> None:
        """Ends all reads and frees what the engine holds. The regions are no longer touched afterwards."""
