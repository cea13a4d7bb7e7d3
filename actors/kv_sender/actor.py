"""`KvSender`: the actor that has registered the arenas of a prefill engine and knows what is offered out of them."""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from llm_runtime.actors.actor import Actor, BadMessage, StartFailure, handles
from llm_runtime.actors.kv_pages import Positive, RankPages, SenderPages, map_arenas, unpack_pages
from llm_runtime.actors.messages import Confirm, Confirmed, Epoch, Offer, Offered, Withdraw, Withdrawn
from llm_runtime.transport.transfer import TransferSettings, TransferUnavailable, create_engine

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 4096
"""Transfers offered at a time. One more, and the oldest counts as withdrawn."""


class SenderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`args["config"]` of a KV sender's child spec.

    Attributes:
        scheduler: the prefill engine's scheduler, which alone may offer.
        ranks: the arenas of the engine's ranks, in order; they come as descriptors of these names. Where nothing is
            read out of them (`shared`, `fake`) they need not come.
        num_pages: KV pages of each.
    """

    scheduler: str
    ranks: Annotated[list[RankPages], Meta(min_length=1, max_length=64)]
    num_pages: Positive
    transfer: TransferSettings = TransferSettings()


@dataclass
class _Transfer:
    receiver: str
    epoch: Epoch
    pages: dict[int, int] = field(default_factory=dict)
    """The pages offered in this epoch, by their index in the sequence."""
    trace: bytes = b""
    began_ns: int = field(default_factory=time.time_ns)


class KvSender(Actor):
    """Passes offers on to receivers, and answers whether what they have read was valid until it was read.

    It is the authority: pages that the scheduler has withdrawn, or that a former incarnation of the scheduler or of
    this actor has offered, are not valid. Whoever reads them must be offered them anew.
    """

    def setup(self) -> None:
        """Registers the arenas. Raises StartFailure when the transfer engine or an arena cannot be had."""
        config = self.config = msgspec.convert(self.args.config, SenderConfig)
        try:
            self.engine = create_engine(config.transfer)
            moves = config.transfer.kind not in ("shared", "fake")
            self.arenas, regions = map_arenas(self.context.descriptors, config.ranks if moves else [], config.num_pages)
            self.engine.register(regions)
        except (TransferUnavailable, ValueError) as error:
            raise StartFailure(str(error)) from error
        pages = SenderPages(config.transfer.kind, config.num_pages, config.ranks, self.engine.endpoint())
        self.endpoint = msgspec.msgpack.encode(pages)
        self.transfers: dict[str, _Transfer] = {}
        self.epochs = itertools.count()
        self.offers = self.pages_offered = self.confirmed = self.refused = self.evicted = 0

    def peer_started(self, peer: str, incarnation: int) -> None:
        """A new scheduler knows nothing of what its former incarnation has offered; a new receiver of no offer."""
        if peer == self.config.scheduler:
            self.transfers.clear()
            return
        for name, transfer in self.transfers.items():
            if transfer.receiver == peer:
                self._offer_again(name, transfer)

    @handles(Offer)
    def offer(self, message: Offer, sender: str) -> None:
        """Remembers the pages, and tells the receiver."""
        self._check_scheduler(message, sender)
        pages = unpack_pages(message.pages, self.config.num_pages)
        indices = range(message.first, message.first + len(pages))
        if indices.stop > self.config.num_pages:
            raise BadMessage(f"pages up to {indices.stop} of a sequence, of {self.config.num_pages} pages in all")
        transfer = self.transfers.get(message.transfer)
        offered = dict(zip(indices, pages, strict=True))
        if transfer is not None and (
            transfer.receiver != message.receiver
            or any(transfer.pages.get(index, page) != page for index, page in offered.items())
        ):
            # The pages have moved without having been withdrawn: what was read of them does not count.
            logger.warning("transfer %s is offered again from other pages", message.transfer)
            del self.transfers[message.transfer]
            transfer = None
        if transfer is None:
            transfer = self._open(message.transfer, message.receiver)
        transfer.pages.update(offered)
        transfer.trace = message.trace
        self.offers += 1
        self.pages_offered += len(pages)
        self._pass_on(message.transfer, transfer, message.first, message.pages)

    @handles(Withdraw)
    def withdraw(self, message: Withdraw, sender: str) -> None:
        """Forgets these transfers, or all."""
        self._check_scheduler(message, sender)
        if message.transfers:
            for name in message.transfers:
                ended = self.transfers.pop(name, None)
                if ended is not None:
                    self.spans.ended(ended.trace, "kv send", ended.began_ns, {"pages": len(ended.pages)})
        else:
            self.transfers.clear()
        self.send(sender, Withdrawn(message.transfers))

    @handles(Confirm)
    def confirm(self, message: Confirm, sender: str) -> None:
        """Says whether the pages have been valid until now."""
        transfer = self.transfers.get(message.transfer)
        valid = transfer is not None and (transfer.receiver, transfer.epoch) == (sender, message.epoch)
        if valid:
            self.confirmed += 1
        else:
            self.refused += 1
        self.send(sender, Confirmed(message.transfer, valid, message.epoch))

    def teardown(self) -> None:
        self.engine.close()

    def stats(self) -> dict[str, float]:
        """Transfers that are offered now; offers and pages offered; confirmations given and refused."""
        return {
            "kv_transfers": float(len(self.transfers)),
            "kv_offers": float(self.offers),
            "kv_pages_offered": float(self.pages_offered),
            "kv_confirmed": float(self.confirmed),
            "kv_refused": float(self.refused),
            "kv_evicted": float(self.evicted),
        }

    def _check_scheduler(self, message: Offer | Withdraw, sender: str) -> None:
        if sender != self.config.scheduler:
            raise BadMessage(f"{sender} sent {type(message).__name__}, which only {self.config.scheduler} may")

    def _open(self, name: str, receiver: str) -> _Transfer:
        if len(self.transfers) >= MAX_TRANSFERS:
            oldest = next(iter(self.transfers))
            logger.warning("transfer %s counts as withdrawn: more than %d are offered", oldest, MAX_TRANSFERS)
            del self.transfers[oldest]
            self.evicted += 1
        # Above all epochs of former incarnations: what they have confirmed is not mixed up with what this one has.
        epoch = (self.mailbox.incarnation, next(self.epochs))
        transfer = self.transfers[name] = _Transfer(receiver, epoch)
        return transfer

    def _offer_again(self, name: str, transfer: _Transfer) -> None:
        indices = sorted(transfer.pages)
        for _, run in itertools.groupby(enumerate(indices), lambda item: item[1] - item[0]):
            run_indices = [index for _, index in run]
            pages = array("i", (transfer.pages[index] for index in run_indices))
            self._pass_on(name, transfer, run_indices[0], pages.tobytes())

    def _pass_on(self, name: str, transfer: _Transfer, first: int, pages: bytes) -> None:
        message = Offered(name, first, pages, self.endpoint, len(self.config.ranks), transfer.epoch)
        self.send(transfer.receiver, message)
