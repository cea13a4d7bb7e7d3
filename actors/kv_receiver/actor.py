"""`KvReceiver`: the actor that brings the pages of prefill engines into those of its own engine's ranks."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from typing import Annotated

import msgspec
from msgspec import Meta

from llm_runtime.actors.actor import Actor, BadMessage, StartFailure, handles
from llm_runtime.actors.kv_pages import Positive, RankPages, SenderPages, map_arenas, unpack_pages
from llm_runtime.actors.kv_receiver.early import EarlyOffers
from llm_runtime.actors.kv_receiver.route import Mismatch, find_route
from llm_runtime.actors.kv_receiver.staging import Staging
from llm_runtime.actors.kv_receiver.transfer import End, Pages, Read, Source, Transfer
from llm_runtime.actors.messages import (
    CancelReceive,
    Confirm,
    Confirmed,
    Epoch,
    Offered,
    Receive,
    ReceiveCancelled,
    Received,
    ReceiveFailed,
)
from llm_runtime.actors.spans import SpanValue
from llm_runtime.transport import Arena
from llm_runtime.transport.transfer import Region, TransferSettings, TransferUnavailable, create_engine

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 4096
MAX_FINISHED = 4096
"""Transfers whose end is remembered, to be told again."""
MAX_SOURCES = 256
MAX_READS = 4
"""Reads under way at a time, of all transfers together: no more than keeps the engine busy, so that those of one long
transfer do not stand before all others, and each has its part of the network while its time runs."""
MAX_READ_BYTES = 32 * 2**20
MAX_FAILURES = 6
RETRY_S = 0.25
"""After a read has failed for the first time; doubled each time. A sender that is started anew offers again itself."""
CONFIRM_INTERVAL_S = 1.0
_TICK_S = 0.25


class ReceiverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`args["config"]` of a KV receiver's child spec.

    Attributes:
        scheduler: the decode engine's scheduler, which alone may ask for pages.
        ranks: the arenas of the engine's ranks, in order; they come as descriptors of these names. Where nothing is
            read (`shared`, `fake`) they need not come.
        num_pages: KV pages of each.
        sources: descriptors of the arenas of prefill engines of this node; for `shm` alone.
        staging_bytes: for pages of senders whose ranks hold other heads than the own ones.
    """

    scheduler: str
    ranks: Annotated[list[RankPages], Meta(min_length=1, max_length=64)]
    num_pages: Positive
    transfer: TransferSettings = TransferSettings()
    sources: list[str] = []
    staging_bytes: Annotated[int, Meta(ge=2**16, le=2**36)] = 64 * 2**20


class KvReceiver(Actor):
    """Reads what is offered for the transfers that its scheduler has announced, has it confirmed, and reports.

    What becomes of a transfer is told only when no read of it is under way any more, so whoever is told may give the
    pages to somebody else.
    """

    def setup(self) -> None:
        """Registers the arenas. Raises StartFailure when the transfer engine or an arena cannot be had."""
        config = self.config = msgspec.convert(self.args.config, ReceiverConfig)
        self.moves = config.transfer.kind not in ("shared", "fake")
        try:
            if config.sources and config.transfer.kind != "shm":
                raise ValueError(f"sources are for shm: leave them out where kind is {config.transfer.kind}")
            descriptors = self.context.descriptors
            self.arenas, regions = map_arenas(descriptors, config.ranks if self.moves else [], config.num_pages)
            self.sources_mapped = {name: Arena(descriptors[name], private=True) for name in config.sources}
            self.engine = create_engine(
                config.transfer, {name: arena.buffer for name, arena in self.sources_mapped.items()}
            )
            own = list(zip(config.ranks, (region.buffer for region in regions), strict=False))
            self.staging = Staging(config.staging_bytes, MAX_READS, own, config.num_pages)
            self.engine.register([*regions, Region(f"{self.name}.staging", self.staging.buffer)])
        except KeyError as error:
            raise StartFailure(f"the descriptor {error.args[0]} was not handed down") from error
        except (TransferUnavailable, ValueError) as error:
            raise StartFailure(str(error)) from error
        self.watched.append(self.engine.fileno())
        self.transfers: dict[str, Transfer] = {}
        self.former: dict[str, Transfer] = {}
        """Those of a former scheduler with reads that have not stopped yet."""
        self.owed: dict[str, str] = {}
        """Cancellations to answer when there are none of these any more: scheduler by transfer."""
        self.finished: OrderedDict[str, Received | ReceiveFailed] = OrderedDict()
        self.early = EarlyOffers()
        self.reads: dict[int, Read] = {}
        self.ready: deque[Transfer] = deque()
        """Transfers with offered pages that are not being read."""
        self.sources: OrderedDict[bytes, Source | Mismatch] = OrderedDict()
        self.received = self.failed = self.cancelled = self.reads_failed = self.refused = self.nbytes = 0
        self.every(_TICK_S, self._tick)

    def peer_started(self, peer: str, incarnation: int) -> None:
        """A new scheduler has no transfers yet; what a new sender's former incarnation has offered is void."""
        if peer == self.config.scheduler:
            self.owed.clear()
            self.finished.clear()
            for transfer in list(self.transfers.values()):
                self._end(transfer, End.DROPPED)
            return
        for transfer in list(self.transfers.values()):
            if transfer.sender == peer and transfer.end is None:
                transfer.failures = 0
                self._begin_anew(transfer, (incarnation, 0))

    # -- the scheduler ----------------------------------------------------------------------------------------------

    @handles(Receive)
    def receive(self, message: Receive, sender: str) -> None:
        """Opens a transfer, or says again how it has ended."""
        self._check_scheduler(message, sender)
        finished = self.finished.get(message.transfer)
        if finished is not None:
            self.send(sender, finished)
            return
        transfer = self.transfers.get(message.transfer)
        try:
            pages = unpack_pages(message.pages, self.config.num_pages)
            if len(set(pages)) != len(pages):
                raise BadMessage(f"transfer {message.transfer} is to fill a page twice")
        except BadMessage as error:
            if transfer is None:
                self.send(sender, ReceiveFailed(message.transfer, str(error)))
            raise
        if transfer is not None:
            if (transfer.sender, transfer.first, transfer.pages) != (message.sender, message.first, pages):
                raise BadMessage(f"transfer {message.transfer} is under way with other pages")
            return
        transfer = Transfer(message.transfer, message.sender, message.first, pages, message.trace)
        self.transfers[transfer.name] = transfer
        if len(self.transfers) > MAX_TRANSFERS:
            self._fail(transfer, f"{MAX_TRANSFERS} transfers are under way already")
            return
        for offer in self.early.take(transfer.sender, transfer.name):
            self._take(transfer, offer)
        self._go_on(transfer)

    @handles(CancelReceive)
    def cancel(self, message: CancelReceive, sender: str) -> None:
        """Stops a transfer. While reads for a former scheduler are stopping no answer is given: it would not be true
        that nothing is written any more."""
        self._check_scheduler(message, sender)
        self.finished.pop(message.transfer, None)
        transfer = self.transfers.get(message.transfer)
        if transfer is not None:
            self._end(transfer, End.CANCELLED)
        elif self.former:
            self.owed[message.transfer] = sender
        else:
            self.send(sender, ReceiveCancelled(message.transfer))

    # -- senders ----------------------------------------------------------------------------------------------------

    @handles(Offered)
    def offered(self, message: Offered, sender: str) -> None:
        """Takes what is wanted of the pages, or keeps the offer until the scheduler speaks of the transfer."""
        if message.transfer in self.finished:
            return
        source = self._source(message.endpoint)
        transfer = self.transfers.get(message.transfer)
        if isinstance(source, Mismatch):
            if transfer is not None and transfer.sender == sender and transfer.end is None:
                self._fail(transfer, str(source))
            return
        pages = unpack_pages(message.pages, source.num_pages)
        offer = Pages(source, message.epoch, message.first, pages)
        if transfer is None:
            self.early.keep(sender, message.transfer, offer)
        elif transfer.sender == sender:
            self._take(transfer, offer)
            self._go_on(transfer)

    @handles(Confirmed)
    def confirmed(self, message: Confirmed, sender: str) -> None:
        """Ends a transfer whose pages were valid; else it begins anew with what is offered in a later epoch."""
        transfer = self.transfers.get(message.transfer)
        if (
            transfer is None
            or not (transfer.complete and transfer.asked)
            or (transfer.sender, transfer.epoch) != (sender, message.epoch)
        ):
            return
        if message.valid:
            self._complete(transfer)
            return
        self.refused += 1
        incarnation, count = transfer.epoch
        self._begin_anew(transfer, (incarnation, count + 1))
        self._count_failure(transfer, "the sender has withdrawn the pages")

    # -- the course of a transfer -----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Sees which reads have ended, and begins others."""
        for handle, error in self.engine.poll():
            self._read_ended(handle, error)
        while self.ready and len(self.reads) < MAX_READS and not self.former:
            transfer = self.ready.popleft()
            if transfer.readable:
                self._begin_read(transfer)
                if transfer.readable:
                    self.ready.append(transfer)

    def teardown(self) -> None:
        self.engine.close()

    def stats(self) -> dict[str, float]:
        """Transfers under way, and how others have ended; reads under way and failed; bytes read."""
        return {
            "kv_transfers": float(len(self.transfers)),
            "kv_received": float(self.received),
            "kv_failed": float(self.failed),
            "kv_cancelled": float(self.cancelled),
            "kv_refused": float(self.refused),
            "kv_reads": float(len(self.reads)),
            "kv_reads_failed": float(self.reads_failed),
            "kv_received_bytes": float(self.nbytes),
            "kv_early_offers": float(len(self.early)),
        }

    def _check_scheduler(self, message: Receive | CancelReceive, sender: str) -> None:
        if sender != self.config.scheduler:
            raise BadMessage(f"{sender} sent {type(message).__name__}, which only {self.config.scheduler} may")

    def _source(self, endpoint: bytes) -> Source | Mismatch:
        """What is behind a sender's endpoint. Raises BadMessage if it is not one."""
        known = self.sources.get(endpoint)
        if known is not None:
            self.sources.move_to_end(endpoint)
            return known
        try:
            pages = msgspec.msgpack.decode(endpoint, type=SenderPages)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadMessage(f"an endpoint is not one: {error}") from None
        found: Source | Mismatch
        try:
            found = self._examine(pages)
        except Mismatch as mismatch:
            logger.error("pages cannot be received: %s", mismatch)
            found = mismatch
        self.sources[endpoint] = found
        if len(self.sources) > MAX_SOURCES:
            self.sources.popitem(last=False)
        return found

    def _examine(self, pages: SenderPages) -> Source:
        kind = self.config.transfer.kind
        if pages.kind != kind:
            raise Mismatch(f"the sender transfers with {pages.kind} and the receiver with {kind}: set both to the same")
        route = find_route(pages.ranks, self.config.ranks)
        if route.staged_bytes > self.staging.block_bytes:
            raise Mismatch(
                f"a page of {route.staged_bytes} bytes does not fit into a staging block of "
                f"{self.staging.block_bytes}: raise staging_bytes to {MAX_READS * (route.staged_bytes + 4096)}"
            )
        return Source(pages.engine, route, pages.num_pages)

    def _take(self, transfer: Transfer, offer: Pages) -> None:
        """Adds an offer to a transfer. One of a later epoch makes void what is there; one of an earlier is void."""
        if transfer.end is not None or offer.epoch < transfer.epoch:
            return
        if offer.epoch > transfer.epoch:
            self._begin_anew(transfer, offer.epoch)
        transfer.offer(offer)

    def _begin_anew(self, transfer: Transfer, epoch: Epoch) -> None:
        transfer.begin_anew(epoch)
        for handle in transfer.reads:
            self.engine.cancel(handle)

    def _go_on(self, transfer: Transfer) -> None:
        """Sees to what comes next for a transfer that has changed."""
        if transfer.over:
            return
        if transfer.end is not None:
            if not transfer.reads:
                self._finish(transfer)
        elif self.config.transfer.kind == "shared":
            self._hand_over(transfer)
        elif transfer.complete:
            if transfer.pages:
                self._confirm(transfer)
            else:
                self._complete(transfer)
        elif transfer.readable and transfer not in self.ready:
            self.ready.append(transfer)

    def _hand_over(self, transfer: Transfer) -> None:
        """The pages that are offered are the ones that are wanted, and with the last of them all is done."""
        for index, page in transfer.offered.items():
            if page != transfer.target(index):
                self._fail(
                    transfer, f"page {page} was offered where {transfer.target(index)} is wanted, and neither is copied"
                )
                return
        transfer.offered.clear()
        if transfer.complete:
            self._complete(transfer)

    def _begin_read(self, transfer: Transfer) -> None:
        """Reads the next of the offered pages."""
        source = transfer.source
        assert source is not None
        route, block = source.route, None
        most = MAX_READ_BYTES // (route.direct_bytes + route.staged_bytes)
        if route.sliced and self.moves:
            block = self.staging.take()
            most = min(most, self.staging.block_bytes // route.staged_bytes)
        indices = sorted(transfer.offered)[: max(1, most)]
        sources = [transfer.offered.pop(index) for index in indices]
        targets = [transfer.target(index) for index in indices]
        pieces = route.pieces(sources, targets, (len(self.config.ranks), block or 0))
        handle = self.engine.read(source.endpoint, pieces)
        nbytes = sum(piece.length for piece in pieces) if self.moves else 0
        self.reads[handle] = transfer.reads[handle] = Read(transfer, indices, sources, targets, block, nbytes)

    def _read_ended(self, handle: int, error: str) -> None:
        read = self.reads.pop(handle)
        transfer = read.transfer
        del transfer.reads[handle]
        counts = not read.void and transfer.end is None
        if counts and not error:
            if read.block is not None and transfer.source is not None:
                self.staging.unpack(transfer.source.route, read.block, read.targets)
            transfer.nbytes += read.nbytes
        if read.block is not None:
            self.staging.give_back(read.block)
        if counts and error:
            self.reads_failed += 1
            logger.warning("a read for transfer %s has failed: %s", transfer.name, error)
            transfer.postpone(read, time.monotonic() + RETRY_S * 2**transfer.failures)
            self._count_failure(transfer, error)
        self._go_on(transfer)

    def _count_failure(self, transfer: Transfer, reason: str) -> None:
        transfer.failures += 1
        if transfer.failures >= MAX_FAILURES:
            self._fail(transfer, reason)

    def _confirm(self, transfer: Transfer) -> None:
        now = time.monotonic()
        if not transfer.asked or now - transfer.asked >= CONFIRM_INTERVAL_S:
            transfer.asked = now
            self.send(transfer.sender, Confirm(transfer.name, transfer.epoch))

    def _tick(self) -> None:
        self.early.forget_old()
        for transfer in list(self.transfers.values()):
            transfer.retry(time.monotonic())
            self._go_on(transfer)

    # -- its end ----------------------------------------------------------------------------------------------------

    def _complete(self, transfer: Transfer) -> None:
        transfer.over = True
        self._trace(transfer)
        self.received += 1
        self.nbytes += transfer.nbytes
        self._tell(transfer, Received(transfer.name, transfer.nbytes))

    def _fail(self, transfer: Transfer, reason: str) -> None:
        transfer.reason = reason
        self._end(transfer, End.FAILED)

    def _end(self, transfer: Transfer, end: End) -> None:
        """Ends a transfer as soon as its reads have stopped. A later call outdoes an earlier one."""
        transfer.end = end
        for handle in transfer.reads:
            self.engine.cancel(handle)
        if end is End.DROPPED:
            self.former[transfer.name] = self.transfers.pop(transfer.name)
        self._go_on(transfer)

    def _finish(self, transfer: Transfer) -> None:
        """Nothing is written for the transfer any more."""
        transfer.over = True
        self._trace(transfer, transfer.reason or str(transfer.end))
        if transfer.end is End.DROPPED:
            del self.former[transfer.name]
            if not self.former:
                for name, scheduler in self.owed.items():
                    self.send(scheduler, ReceiveCancelled(name))
                self.owed.clear()
        elif transfer.end is End.CANCELLED:
            self.cancelled += 1
            del self.transfers[transfer.name]
            self.send(self.config.scheduler, ReceiveCancelled(transfer.name))
        else:
            self.failed += 1
            logger.warning("transfer %s has failed: %s", transfer.name, transfer.reason)
            self._tell(transfer, ReceiveFailed(transfer.name, transfer.reason))

    def _trace(self, transfer: Transfer, error: str = "") -> None:
        attributes: dict[str, SpanValue] = {"pages": len(transfer.pages), "bytes": transfer.nbytes}
        self.spans.ended(transfer.trace, "kv receive", transfer.began_ns, attributes, error=error)

    def _tell(self, transfer: Transfer, message: Received | ReceiveFailed) -> None:
        del self.transfers[transfer.name]
        self.finished[transfer.name] = message
        if len(self.finished) > MAX_FINISHED:
            self.finished.popitem(last=False)
        self.send(self.config.scheduler, message)
