"""One transfer as its receiver sees it: which pages are wanted, offered, being read and in place."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llm_runtime.actors.kv_receiver.route import Route
from llm_runtime.actors.messages import NO_EPOCH, Epoch


@dataclass(frozen=True)
class Source:
    """What a sender's endpoint has been found to be."""

    endpoint: bytes
    route: Route
    num_pages: int


@dataclass(frozen=True)
class Pages:
    """Offered pages of a sequence, from index `first` on."""

    source: Source
    epoch: Epoch
    first: int
    pages: Sequence[int]


@dataclass(eq=False)
class Read:
    """A read under way. `block` is its staging block. What a void one brings does not count."""

    transfer: Transfer
    indices: list[int]
    sources: list[int]
    targets: list[int]
    block: int | None
    nbytes: int
    void: bool = False


class End(enum.Enum):
    """What becomes of a transfer as soon as nothing is written for it any more."""

    FAILED = enum.auto()
    CANCELLED = enum.auto()
    DROPPED = enum.auto()


class Transfer:
    """Its pages go from missing to offered to read; when all are in place they have to be confirmed. A page whose read
    has failed is postponed, until it is offered again or some time has passed.

    Attributes:
        epoch: the epoch of the sender in which the pages were offered. Older ones are void.
        reads: under way, by handle; void ones too.
        end: set when the transfer is to end before it is complete, with the reason.
        over: it has ended.
        asked: when confirmation was last asked for, 0.0 if it was not yet.
        failures: reads that have failed and confirmations that were refused, since the sender was started.
        retry_at: when postponed pages are tried again.
        trace: the trace that it belongs to. began_ns: when it was announced, since 1970.
    """

    def __init__(self, name: str, sender: str, first: int, pages: Sequence[int], trace: bytes = b"") -> None:
        self.name = name
        self.sender = sender
        self.first = first
        self.pages = pages
        self.trace = trace
        self.began_ns = time.time_ns()
        self.reads: dict[int, Read] = {}
        self.end: End | None = None
        self.over = False
        self.reason = ""
        self.failures = 0
        self.retry_at = 0.0
        self.begin_anew(NO_EPOCH)

    def begin_anew(self, epoch: Epoch) -> None:
        """Forgets what was offered and read in earlier epochs than this."""
        self.epoch = epoch
        self.source: Source | None = None
        self.missing = set(range(self.first, self.first + len(self.pages)))
        self.offered: dict[int, int] = {}
        self.postponed: dict[int, int] = {}
        self.nbytes = 0
        self.asked = 0.0
        for read in self.reads.values():
            read.void = True

    def offer(self, offer: Pages) -> None:
        """Takes what is wanted of the offered pages of the present epoch."""
        self.source = offer.source
        for index, page in enumerate(offer.pages, offer.first):
            if index in self.missing or index in self.postponed:
                self.missing.discard(index)
                self.postponed.pop(index, None)
                self.offered[index] = page

    def postpone(self, read: Read, retry_at: float) -> None:
        """A read has failed."""
        self.retry_at = retry_at
        self.postponed.update(zip(read.indices, read.sources, strict=True))

    def retry(self, now: float) -> None:
        """Postponed pages may be read again when it is time."""
        if self.postponed and now >= self.retry_at:
            self.offered.update(self.postponed)
            self.postponed.clear()

    def target(self, index: int) -> int:
        """The own page of an index."""
        return self.pages[index - self.first]

    @property
    def readable(self) -> bool:
        """Whether offered pages may be read now: not while a void read may still write into the same ones."""
        return bool(self.offered) and self.end is None and not any(read.void for read in self.reads.values())

    @property
    def complete(self) -> bool:
        """Whether all pages are in place."""
        return not (self.missing or self.offered or self.postponed or self.reads) and self.end is None
