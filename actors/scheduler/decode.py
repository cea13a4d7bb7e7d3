"""The scheduler of an engine that decodes and has its prompts computed by other engines."""

from __future__ import annotations

from llm_runtime.actors.actor import Context, handles
from llm_runtime.actors.messages import (
    Prefilled,
    PrefillRefused,
    ReceiveCancelled,
    Received,
    ReceiveFailed,
    Registry,
    Released,
)
from llm_runtime.actors.scheduler.actor import Scheduler
from llm_runtime.actors.scheduler.batch import Batch, Departure
from llm_runtime.actors.scheduler.transfers import Transfer, Transfers


class DecodeScheduler(Scheduler):
    """Owns its requests as every scheduler does, but lends pages to a prefill engine for the prompt, and goes on with
    the token and the KV that come back. Where a transfer fails, the request is planned anew, with other pages."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.transfers = Transfers(self.config, self.name, self.mailbox.incarnation, self.send, self.pool)
        self.met: set[str] = set()
        self.transferred = self.transferred_bytes = self.failed_transfers = 0

    def new_batch(self) -> Batch:
        return Batch(
            self.config,
            self.pool,
            self.times,
            self.speculation,
            lambda request, missing: self.transfers.place(request, missing),
        )

    def planned(self) -> None:
        self.batch.admit_elsewhere()
        departing, self.batch.departing = self.batch.departing, []
        for each in departing:
            self._depart(each)
        self.transfers.end_unwanted()
        super().planned()

    def peer_started(self, peer: str, incarnation: int) -> None:
        super().peer_started(peer, incarnation)
        if peer in self.met:  # else it may be the one that has all along what it was asked for
            self._plan_anew(self.transfers.restarted(peer))
        self.met.add(peer)

    def sweep(self) -> None:
        super().sweep()
        self.transfers.repeat()

    def stats(self) -> dict[str, float]:
        return {
            **super().stats(),
            "prefill_engines": len(self.transfers.engines),
            "transfers": len(self.transfers.active),
            "num_decode_transfer_queue_reqs": len(self.transfers.active),
            "transfers_ending": len(self.transfers.settling),
            "transfers_total": self.transferred,
            "transfers_failed": self.failed_transfers,
            "transferred_bytes": self.transferred_bytes,
        }

    def start_over(self) -> None:
        self._plan_anew(list(self.transfers.active.values()))
        self.transfers.end_unwanted()
        super().start_over()
        self.transfers.pool = self.pool

    @handles(Registry)
    def registry(self, message: Registry, sender: str) -> None:
        """The engines that there are."""
        self._plan_anew(self.transfers.update(message.engines))

    @handles(Prefilled)
    def prefilled(self, message: Prefilled, sender: str) -> None:
        """The token that follows a sequence."""
        self._go_on(self.transfers.answered(message))

    @handles(Received)
    def received(self, message: Received, sender: str) -> None:
        """The KV of a sequence is in its pages."""
        if message.transfer in self.transfers.active:
            self.transferred_bytes += message.nbytes
        self._go_on(self.transfers.received(message.transfer))

    @handles(PrefillRefused)
    def prefill_refused(self, message: PrefillRefused, sender: str) -> None:
        """A prefill engine will not compute a sequence, and no other would."""
        transfer = self.transfers.active.get(message.transfer)
        if transfer is not None and transfer.wanted:
            self.refuse(transfer.request, message.status, message.message)

    @handles(ReceiveFailed)
    def receive_failed(self, message: ReceiveFailed, sender: str) -> None:
        """The KV was computed and has got lost."""
        transfer = self.transfers.active.get(message.transfer)
        if transfer is not None:
            transfer.request.failed_transfers += 1
            self._plan_anew([transfer])

    @handles(Released)
    def released(self, message: Released, sender: str) -> None:
        """A prefill engine is done with a transfer, or has dropped it."""
        self.transfers.done(sender, message.transfer)
        transfer = self.transfers.active.get(message.transfer)
        if transfer is not None:
            self._plan_anew([transfer])

    @handles(ReceiveCancelled)
    def receive_cancelled(self, message: ReceiveCancelled, sender: str) -> None:
        """Nothing is written for a transfer any more."""
        self.transfers.done(sender, message.transfer)

    def _depart(self, departure: Departure) -> None:
        """Has a prompt computed elsewhere, as soon as the ranks do not write into its pages any more."""
        request, block_table = departure.request, departure.block_table
        answered = self.in_flight[0].number - 1 if self.in_flight else self.steps
        if not departure.wanted:
            self.pool.take_back(departure.pages)
        elif departure.after > answered:
            self.batch.departing.append(departure)
        else:
            if request.phases is not None:
                request.phases.enter("transfer", block_table)
            if not self.transfers.begin(request, block_table):
                self.batch.retract(request)
                self.pool.take_back(departure.pages)

    def _plan_anew(self, transfers: list[Transfer]) -> None:
        """Transfers that lead to nothing: their requests wait again."""
        for transfer in transfers:
            if transfer.wanted:
                self.failed_transfers += 1
                self.batch.retract(transfer.request)

    def _go_on(self, transfer: Transfer | None) -> None:
        """A transfer is complete: its request is decoded from here on."""
        if transfer is None or transfer.answer is None:
            return
        request, answer = transfer.request, transfer.answer
        self.transferred += 1
        if not request.output_len:
            request.cached_tokens = answer.cached_tokens
        request.prompt_logprobs = answer.prompt_logprobs or []
        self.batch.arrived(request)
        if request.phases is not None:
            request.phases.enter("decode")
        tokens = [] if answer.token is None else [answer.token]
        for token in tokens:
            request.append(token)
        self.deliver(request, tokens, answer.logprobs)
