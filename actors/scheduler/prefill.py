"""The scheduler of an engine that computes prompts for engines that decode."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

import msgspec

from llm_runtime.actors.actor import Context, handles, role_of
from llm_runtime.actors.messages import (
    Generate,
    Offer,
    Prefill,
    Prefilled,
    PrefillRefused,
    Release,
    Released,
    TextParams,
    TokenLogprob,
    Withdraw,
    Withdrawn,
)
from llm_runtime.actors.scheduler.batch import Batch, Row
from llm_runtime.actors.scheduler.engine import EngineScheduler
from llm_runtime.actors.scheduler.lent import LentBatch
from llm_runtime.actors.scheduler.request import Request

SILENCE_S = 30.0
"""A decode engine repeats every second what it wants. What it has not asked for in so long is dropped."""
FENCE_INTERVAL_S = 0.5
REMEMBERED = 10_000
"""Transfers that were dropped, to tell a decode engine that asks for one again."""


@dataclass(slots=True, eq=False)
class Job:
    """A sequence that is computed for a decode engine.

    Attributes:
        request: its id is the transfer's, its owner the decode scheduler.
        first: index of the first page that the decode engine lacks. offered: of the first not offered yet.
        heard: when the decode engine asked for it last.
        answer: once all is computed. The pages stay until they are released.
        dropped: nobody has asked for so long that it ends when the KV sender has forgotten it.
    """

    request: Request
    receiver: str
    first: int
    offered: int
    heard: float
    answer: Prefilled | None = None
    dropped: bool = False


class PrefillScheduler(EngineScheduler):
    """Computes sequences chunk by chunk, offers their pages to the decode engine's KV receiver as they are finished,
    and holds them until they are released."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.jobs: dict[str, Job] = {}
        self.dropped: dict[str, None] = {}
        # Transfers that are over while steps may still write into their pages: (transfer, its owner, its request).
        self.leaving: list[tuple[str, str, Request]] = []
        self.asked: list[tuple[str, str]] = []
        self.fenced = self.config.shared_kv
        self.prefilled = 0

    def new_batch(self) -> Batch:
        if self.config.shared_kv:
            return LentBatch(self.config, self.pool, self.times)
        return super().new_batch()

    # -- life -------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """What a former incarnation has offered is void before any of its pages is used again."""
        super().setup()
        asked = 0.0
        while not self.fenced and not self.link.shutdown_requested:
            if time.monotonic() - asked > FENCE_INTERVAL_S:
                asked = time.monotonic()
                self.send(self.config.transfer, Withdraw())
            self.mailbox.poll(0.05)
            self.drain()

    def planned(self) -> None:
        """Answers for transfers that no step under way belongs to any more."""
        if not self.leaving and not self.asked:
            return
        busy = {row.request for step in self.in_flight for row in step.rows}
        self.leaving = [entry for entry in self.leaving if entry[2] in busy]
        waiting = {entry[0] for entry in self.leaving}
        owners = {entry[1] for entry in self.leaving}
        left: list[tuple[str, str]] = []
        for transfer, owner in self.asked:
            # A transfer that is not known may be of the owner's former incarnation, all of whose steps it asks about.
            if transfer in waiting or (transfer not in self.requests and owner in owners):
                left.append((transfer, owner))
            else:
                self.send(owner, Released(transfer))
        self.asked = left

    def peer_started(self, peer: str, incarnation: int) -> None:
        super().peer_started(peer, incarnation)
        if role_of(peer) == "scheduler":
            for job in [job for job in self.jobs.values() if job.request.owner == peer]:
                self._end(job)
        elif peer == self.config.transfer:
            for job in self.jobs.values():
                job.offered = job.first
                self._offer(job)

    def sweep(self) -> None:
        """Drops what nobody has asked for in a long time."""
        super().sweep()
        now = time.monotonic()
        for job in list(self.jobs.values()):
            if not job.dropped and now - job.heard > SILENCE_S:
                job.dropped = True
            if job.dropped and self.config.shared_kv:
                self._end(job)
            elif job.dropped:
                self.send(self.config.transfer, Withdraw([job.request.rid]))

    def stats(self) -> dict[str, float]:
        waiting = sum(job.answer is not None for job in list(self.jobs.values()))
        return {
            **super().stats(),
            "prefills": self.prefilled,
            "transfers": len(self.jobs),
            "num_prefill_inflight_queue_reqs": waiting,
        }

    # -- transfers --------------------------------------------------------------------------------------

    @handles(Prefill)
    def prefill(self, message: Prefill, sender: str) -> None:
        """A sequence arrives, or a decode engine has waited for an answer and may have missed what it was told."""
        job = self.jobs.get(message.transfer)
        if job is None:
            if message.transfer in self.dropped:
                self.send(sender, Released(message.transfer))
            else:
                self._begin(message, sender)
        elif not job.dropped:
            job.heard = time.monotonic()
            job.offered = job.first
            self._offer(job)
            if job.answer is not None:
                self.send(sender, job.answer)

    @handles(Release)
    def release(self, message: Release, sender: str) -> None:
        """A transfer is over. Answered when no step writes into its pages any more."""
        job = self.jobs.get(message.transfer)
        if job is not None:
            self._end(job)
        self.asked.append((message.transfer, sender))

    @handles(Withdrawn)
    def withdrawn(self, message: Withdrawn, sender: str) -> None:
        """The KV sender has forgotten transfers, or all of them if none is named."""
        if not message.transfers:
            self.fenced = True
        for transfer in message.transfers:
            job = self.jobs.get(transfer)
            if job is not None and job.dropped:
                self._end(job)

    def _begin(self, message: Prefill, sender: str) -> None:
        size, length, pages = self.config.page_size, len(message.tokens) // 4, array("i")
        whole = len(message.tokens) % 4 == 0 and len(message.pages) % 4 == 0
        if whole:
            pages.frombytes(message.pages)
        if not whole or not 0 < message.prompt_len <= length or message.held % size or message.held >= length:
            text = "The sequence cannot be prefilled: tokens, prompt_len, held and pages do not fit together."
            self.send(sender, PrefillRefused(message.transfer, 500, text))
            return
        if self.config.shared_kv and (
            len(pages) < -(-length // size) or min(pages) < 0 or max(pages) >= self.config.arena_pages
        ):
            text = f"The sequence cannot be prefilled: {len(pages)} pages do not do for its {length} tokens."
            self.send(sender, PrefillRefused(message.transfer, 500, text))
            return
        if length > self.config.max_model_len:
            text = f"The sequence has {length} tokens; {self.config.max_model_len} are the most that can be prefilled."
            self.send(sender, PrefillRefused(message.transfer, 400, text))
            return
        unknown = self.unknown_token(message.tokens, message.sampling)
        if unknown:
            self.send(sender, PrefillRefused(message.transfer, 400, unknown))
            return
        output = length - message.prompt_len
        wanted = message.sampling.max_tokens > output and length < self.config.max_model_len
        generate = Generate(
            message.transfer,
            0,
            message.tokens[: 4 * message.prompt_len],
            msgspec.structs.replace(message.sampling, max_tokens=output + wanted),
            TextParams(),
            message.tokens[4 * message.prompt_len :],
            priority=message.priority,
            extra_key=message.extra_key,
            trace=message.trace,
        )
        self.arrivals += 1
        request = Request(generate, sender, self.arrivals, size)
        request.room = message.sampling.max_tokens
        reason = self.grammars.hold(request)
        if reason:
            self.send(sender, PrefillRefused(message.transfer, 400, reason))
            return
        first = message.held // size
        self.jobs[request.rid] = Job(request, message.receiver, first, first, time.monotonic())
        self.requests[request.rid] = request
        self.trace(request)
        if isinstance(self.batch, LentBatch):
            self.batch.lend(request, pages.tolist(), message.held)
        else:
            self.batch.add(request)

    def _end(self, job: Job) -> None:
        """Forgets a transfer; its pages stay in the prefix tree while there is room."""
        request = job.request
        self.leaving.append((request.rid, request.owner, request))
        del self.jobs[request.rid], self.requests[request.rid]
        self._end_phases(job, "no longer wanted")
        self.batch.remove(request)
        if job.dropped:
            self.dropped[request.rid] = None
            while len(self.dropped) > REMEMBERED:
                del self.dropped[next(iter(self.dropped))]
        else:
            self.send(self.config.transfer, Withdraw([request.rid]))

    def _end_phases(self, job: Job, error: str = "") -> None:
        """Reports the last phase of a traced request."""
        phases, job.request.phases = job.request.phases, None
        if phases is not None:
            phases.end({"cached_tokens": job.request.cached_tokens}, error)

    def _offer(self, job: Job) -> None:
        """Offers the pages that hold their final KV: full ones, in their place in the prefix tree if there is one, and
        at the end the last one too. A request that wants logprobs of its prompt may have to start over until then."""
        request = job.request
        if request.block_table is None or (request.wants_prompt_logprobs and job.answer is None):
            return
        full = request.shared if self.pool.prefix_cache else request.computed // self.config.page_size
        count = -(-request.computed // self.config.page_size) if job.answer is not None else full
        if count > job.offered:
            pages = array("i", request.block_table.pages[job.offered : count]).tobytes()
            self.send(self.config.transfer, Offer(request.rid, job.receiver, job.offered, pages, request.trace))
            job.offered = count

    # -- steps ------------------------------------------------------------------------------------------

    def advance(
        self,
        row: Row,
        drawn: list[int],
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[TokenLogprob] | None,
    ) -> None:
        request = row.request
        if drawn:
            request.pending -= 1
        job = self.jobs.get(request.rid)
        if job is None or job.request is not request or job.answer is not None:
            return
        if prompt_logprobs is not None:
            request.prompt_logprobs += prompt_logprobs
        length = len(request.tokens)
        for token in drawn:
            request.append(token)
        self.batch.computed(row)
        if drawn or (request.computed == length and request.exhausted(self.config.max_model_len)):
            self._answer(job, drawn[0] if drawn else None, logprobs)
        self._offer(job)

    def _answer(self, job: Job, token: int | None, logprobs: list[TokenLogprob] | None) -> None:
        request = job.request
        assert request.block_table is not None
        self.batch.share(request, request.block_table)
        request.finish = "length"
        self._end_phases(job)
        self.prefilled += 1
        self.prompt_tokens += request.prompt_len
        self.cached_tokens += request.cached_tokens
        prompt = request.prompt_logprobs or None
        job.answer = Prefilled(request.rid, token, request.cached_tokens, logprobs, prompt)
        self.send(request.owner, job.answer)

    def refuse(self, request: Request, status: int, message: str) -> None:
        self.send(request.owner, PrefillRefused(request.rid, status, message))
        self._end(self.jobs[request.rid])

    def start_over(self) -> None:
        """The KV pages are empty: what was offered of them is void, and decode engines ask again for what they lack."""
        for job in list(self.jobs.values()):
            self.send(job.request.owner, Released(job.request.rid))
            self._end(job)
        super().start_over()
