"""Engines whose reads are carried out by a thread of their own, so that their caller is never held up."""

from __future__ import annotations

import enum
import itertools
import logging
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import msgspec

from llm_runtime.transport.transfer.engine import MAX_ENDPOINT_BYTES, Piece, Region, TransferFailed, TransferStuck

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3
_GRACE_S = 1.0
_MAX_KNOWN_ENDPOINTS = 256


class Endpoint(msgspec.Struct, array_like=True, frozen=True):
    """An engine's endpoint as bytes: which kind it is, the bytes of each of its regions, and what is its kind's own."""

    kind: str
    sizes: list[int]
    detail: bytes


class Progress(enum.Enum):
    """What a look at a read has found."""

    WAITING = enum.auto()
    MOVED = enum.auto()
    DONE = enum.auto()


class Reading(ABC):
    """A read under way. Used by the engine's thread alone."""

    @abstractmethod
    def advance(self) -> Progress:
        """Goes on for a moment, some milliseconds at most. Raises TransferFailed."""

    @abstractmethod
    def stop(self) -> bool:
        """Asks for the end, and again until the answer is True: nothing is written any more."""


class _Job:
    def __init__(self, handle: int, endpoint: bytes, pieces: Sequence[Piece]) -> None:
        self.handle = handle
        self.endpoint = endpoint
        self.pieces = pieces
        self.cancelled = False
        self.reading: Reading | None = None
        self.error: str | None = None
        """Set when the read is to be stopped."""
        self.deadline = 0.0


class WorkerEngine(ABC):
    """Base of engines with a thread. A subclass says how a read begins; see `Reading` for how it goes on.

    Args:
        timeout_s: a read without progress for so long is stopped and fails; if it has not stopped a second later, or a
            cancelled one after that time and a second, the engine is stuck.
    """

    kind: str

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._regions: list[Region] = []
        self._jobs: dict[int, _Job] = {}
        self._handles = itertools.count(1)
        self._begun: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ended: deque[tuple[int, str]] = deque()
        self._stuck = ""
        self._looked_at = 0.0
        """When the thread last looked at its reads, 0.0 while it has none."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._endpoints: dict[bytes, Endpoint] = {}
        self._thread = threading.Thread(target=self._run, name=f"{self.kind} transfers", daemon=True)

    # -- what a kind of engine is -----------------------------------------------------------------------------------

    @abstractmethod
    def _attach(self, regions: Sequence[Region]) -> None:
        """Makes the own memory known to the system. Raises TransferUnavailable."""

    @abstractmethod
    def _detail(self) -> bytes:
        """The part of the endpoint that is the kind's own."""

    @abstractmethod
    def _begin(self, peer: Endpoint, pieces: Sequence[Piece]) -> Reading:
        """Starts a read whose pieces are known to lie within the regions of both sides. Raises TransferFailed."""

    @abstractmethod
    def _detach(self) -> None:
        """Frees what `_attach` and `_begin` have taken. No read is under way."""

    # -- the interface ----------------------------------------------------------------------------------------------

    def register(self, regions: Sequence[Region]) -> None:
        """See `TransferEngine.register`."""
        self._regions = list(regions)
        self._attach(self._regions)
        self._thread.start()

    def endpoint(self) -> bytes:
        """See `TransferEngine.endpoint`. Raises ValueError if the endpoint would be too long."""
        encoded = msgspec.msgpack.encode(
            Endpoint(self.kind, [region.buffer.nbytes for region in self._regions], self._detail())
        )
        if len(encoded) > MAX_ENDPOINT_BYTES:
            raise ValueError(f"an endpoint of {len(encoded)} bytes is over the limit of {MAX_ENDPOINT_BYTES} bytes")
        return encoded

    def read(self, endpoint: bytes, pieces: Sequence[Piece]) -> int:
        """See `TransferEngine.read`."""
        job = _Job(next(self._handles), endpoint, pieces)
        self._jobs[job.handle] = job
        self._begun.put(job)
        return job.handle

    def poll(self) -> list[tuple[int, str]]:
        """See `TransferEngine.poll`."""
        looked_at = self._looked_at
        if looked_at and time.monotonic() - looked_at > 2 * self._timeout_s + _GRACE_S:
            self._stuck = f"a call of the {self.kind} transfer engine does not return"
        if self._stuck:
            raise TransferStuck(self._stuck)
        try:
            os.eventfd_read(self._wake)  # before the ends are taken: one that comes now wakes the caller again
        except BlockingIOError:
            pass
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        for handle, _ in ended:
            del self._jobs[handle]
        return ended

    def cancel(self, handle: int) -> None:
        """See `TransferEngine.cancel`."""
        job = self._jobs.get(handle)
        if job is not None:
            job.cancelled = True

    def fileno(self) -> int:
        """See `TransferEngine.fileno`."""
        return self._wake

    def close(self) -> None:
        """See `TransferEngine.close`. Raises TransferStuck if a read cannot be ended."""
        if self._thread.is_alive():
            for job in list(self._jobs.values()):
                job.cancelled = True
            self._begun.put(None)
            self._thread.join(2 * (self._timeout_s + _GRACE_S))
        if self._stuck or self._thread.is_alive():
            raise TransferStuck(self._stuck or f"the {self.kind} transfer engine does not end")
        self._detach()
        self._regions = []
        os.close(self._wake)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.exception("the %s transfer engine has failed", self.kind)
            self._stuck = f"the {self.kind} transfer engine has failed: {error}"
        os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        active: list[_Job] = []
        pause_s, closing = _SHORTEST_PAUSE_S, False
        while not self._stuck and not (closing and not active):
            try:
                job = self._begun.get(not active or pause_s > 0, pause_s if active else None)
                if job is None:
                    closing = True
                else:
                    active.append(job)
            except queue.Empty:
                pass
            moved = False
            self._looked_at = time.monotonic() if active else 0.0
            for job in list(active):
                progress = self._advance(job)
                moved = moved or progress is not Progress.WAITING
                if progress is Progress.DONE:
                    active.remove(job)
                    self._ended.append((job.handle, job.error or ""))
                    os.eventfd_write(self._wake, 1)
            if not active:
                self._looked_at = 0.0
            pause_s = 0 if moved else min(max(2 * pause_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)

    def _advance(self, job: _Job) -> Progress:
        """One look at a job, DONE when it is over."""
        now = time.monotonic()
        if job.cancelled and job.error is None:
            job.error = "the read was cancelled"
            job.deadline = now + self._timeout_s + _GRACE_S
        if job.error is None:
            try:
                if job.reading is None:
                    job.reading = self._begin(self._checked(job), job.pieces)
                    job.deadline = time.monotonic() + self._timeout_s
                progress = job.reading.advance()
            except TransferFailed as failure:
                job.error, job.deadline = str(failure), now + self._timeout_s + _GRACE_S
            else:
                if progress is Progress.MOVED:
                    job.deadline = now + self._timeout_s
                elif progress is Progress.WAITING and now > job.deadline:
                    job.error, job.deadline = f"nothing came from the peer for {self._timeout_s:g} s", now + _GRACE_S
                if job.error is None:
                    return progress
        if job.reading is None or job.reading.stop():
            return Progress.DONE
        if now > job.deadline:
            self._stuck = f"a read of the {self.kind} transfer engine cannot be stopped ({job.error})"
        return Progress.WAITING

    def _checked(self, job: _Job) -> Endpoint:
        """The job's endpoint. Raises TransferFailed if that, or a piece, is not what it should be."""
        peer = self._endpoints.get(job.endpoint)
        if peer is None:
            try:
                peer = msgspec.msgpack.decode(job.endpoint, type=Endpoint)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TransferFailed(f"the endpoint is not one: {error}") from None
            if peer.kind != self.kind:
                raise TransferFailed(f"the peer transfers with {peer.kind}, this side with {self.kind}: use the same")
            if len(self._endpoints) >= _MAX_KNOWN_ENDPOINTS:
                self._endpoints.clear()
            self._endpoints[job.endpoint] = peer
        theirs, own = peer.sizes, [region.buffer.nbytes for region in self._regions]
        for piece in job.pieces:
            if not (
                0 <= piece.remote_region < len(theirs)
                and 0 <= piece.local_region < len(own)
                and piece.length >= 0
                and 0 <= piece.remote_offset <= theirs[piece.remote_region] - piece.length
                and 0 <= piece.local_offset <= own[piece.local_region] - piece.length
            ):
                raise TransferFailed(f"{piece} is not within the registered regions")
        return peer
