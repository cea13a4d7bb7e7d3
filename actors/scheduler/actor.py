"""The scheduler of an engine: requests in, steps to the ranks, tokens to the detokenizer."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np

from actors.actor import Actor, BadMessage, Context, StartFailure, handles
from actors.messages import (
    PROMPT_LOGPROBS,
    SAMPLE,
    Abort,
    Acknowledge,
    Attach,
    Attached,
    EngineInfo,
    FinishReason,
    Generate,
    Hello,
    OpenText,
    Refused,
    Register,
    Resend,
    StepResult,
    Stopped,
    TokenEvent,
    TokenLogprob,
    Tokens,
    Unknown,
)
from actors.scheduler.batch import Batch, Row
from actors.scheduler.config import Config
from actors.scheduler.pages import PageLedger, PagePool
from actors.scheduler.poison import Bisection
from actors.scheduler.request import Request
from actors.scheduler.speculation import Speculation
from actors.scheduler.step_times import StepTimes
from actors.scheduler.wire import encode_step, token_logprobs
from transport import Arena

logger = logging.getLogger(__name__)

REGISTER_INTERVAL_S = 1.0
SWEEP_INTERVAL_S = 1.0
RANK_SILENCE_S = 3.0
"""After so long without an answer the scheduler asks the ranks to attach again. A step may well take longer; then it is
answered first, and only what was sent ahead of it is sent again."""
ATTACH_SILENCE_S = 15.0
"""The same when it is `Attach` that is not answered."""
SLOW_START_TOKENS = 64
"""New prompt tokens of the first step after a restart of the ranks or of this actor; each answer doubles it."""
KEEP_FINISHED_S = 300.0
"""How long a finished request is kept for an ingress that does not acknowledge it."""
KEEP_PARTIAL_S = 10.0
"""How long after a restart partly filled pages wait for the requests that they belong to."""


@dataclass(slots=True)
class InFlight:
    """A step that has been sent and not been answered.

    Attributes:
        sent: when, if the ranks had nothing else to do then.
    """

    number: int
    rows: list[Row]
    sent: float | None = None

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(row.length for row in self.rows)

    @property
    def speculative(self) -> bool:
        """Whether it verifies guesses, so that nobody knows where their requests go on."""
        return any(row.draft for row in self.rows)


@dataclass(slots=True)
class Outbox:
    """What the present turn has for the detokenizer; sent as one message."""

    opens: list[OpenText] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    closes: list[str] = field(default_factory=list)


class Scheduler(Actor):
    """Owns the waiting queue, the running batch, the page pool and the prefix tree of one engine. All soft state: a new
    incarnation gets the requests from the ingresses and finds the pages in the ledger's arena."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.config = config = msgspec.convert(self.args.config, Config)
        if config.max_model_len > config.num_pages * config.page_size:
            raise StartFailure(
                f"engine {config.engine}: max_model_len {config.max_model_len} does not fit in the KV pool of "
                f"{config.num_pages * config.page_size} tokens: raise kv_tokens or lower max_model_len"
            )
        arena = Arena(context.descriptors[f"{config.engine}.pages"])
        self.ledger = PageLedger(arena, config.num_pages, config.page_size)
        self.pool = PagePool(self.ledger, config.prefix_cache)
        self.times = StepTimes()
        self.speculation = Speculation(config, self.times) if config.speculation == "ngram" else None
        self.batch = Batch(config, self.pool, self.times, self.speculation)
        self.requests: dict[str, Request] = {}
        self.finished: deque[tuple[float, str]] = deque()
        self.in_flight: deque[InFlight] = deque()
        self.bisection = Bisection(config.poison_limit)
        self.depth = 2 if config.run_ahead else 1
        self.attached: Attached | None = None
        self.leader_incarnation: int | None = None
        self.leader_restarts = 0
        self.heard_of_ranks = time.monotonic()
        self.outbox = Outbox()
        if self.incarnation > 1:
            self._start_slowly()
        self.steps = 0
        self.arrivals = 0
        self.generated = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    # -- life -------------------------------------------------------------------------------------------

    def setup(self) -> None:
        self._attach()
        while self.attached is None and not self.link.shutdown_requested:
            self.mailbox.poll(0.05)
            self.drain()
            self._watch_ranks()
        if self.pool.restored_pages:
            logger.info("took over %d pages of the former incarnation", self.pool.restored_pages)
            self.after(KEEP_PARTIAL_S, self.pool.drop_partial)
        self._register()
        self.every(REGISTER_INTERVAL_S, self._register)
        self.every(SWEEP_INTERVAL_S, self._sweep)

    def turn(self) -> None:
        while self.attached is not None and self._may_send():
            on_trial = self.bisection.on_trial
            if on_trial is not None and self.in_flight:
                break
            rows = self.batch.next_rows(on_trial)
            if not rows:
                break
            self.steps += 1
            step = InFlight(self.steps, rows)
            if not self.in_flight:
                self.heard_of_ranks = step.sent = time.monotonic()
            self.in_flight.append(step)
            self.send(self.config.leader, encode_step(self.steps, rows))
        self._flush()

    def _may_send(self) -> bool:
        """Whether another step may be sent now."""
        if len(self.in_flight) >= self.depth:
            return False
        if not self.in_flight or self.speculation is None:
            return True
        return not self.in_flight[-1].speculative and not self.speculation.worth_waiting(self.batch.running)

    def peer_started(self, peer: str, incarnation: int) -> None:
        if peer == self.config.leader:
            if self.leader_incarnation is not None:
                self.leader_restarts += 1
                self._ranks_died()
                self._attach()
            self.leader_incarnation = incarnation
        elif peer == self.config.detokenizer:
            for request in self.requests.values():
                self._replay(request)
        elif peer == self.config.bootstrap:
            self._register()
        else:
            for request in [request for request in self.requests.values() if request.owner == peer]:
                self._forget(request)

    def stats(self) -> dict[str, float]:
        pages = self.pool.num_pages
        return {
            "num_running_reqs": len(self.batch.running),
            "num_queue_reqs": len(self.batch.waiting),
            "token_usage": 1.0 - self.pool.available / pages,
            "cache_hit_rate": self.cached_tokens / max(1, self.prompt_tokens),
            "prefix_tree_pages": self.pool.tree.total_pages,
            "free_pages": self.pool.free,
            "available_pages": self.pool.available,
            "restored_pages": self.pool.restored_pages,
            "generation_tokens": self.generated,
            "steps": self.steps,
            "retractions": self.batch.retractions,
            **(self.speculation.stats() if self.speculation else {}),
        }

    @handles(Hello)
    def hello(self, message: Hello, sender: str) -> None:
        """A peer is ready. If nothing was heard of the ranks before, their former incarnation may have died with the
        `Attach` that was sent to it."""
        if sender == self.config.leader and self.attached is None and not self.leader_restarts:
            self._attach()

    # -- requests ---------------------------------------------------------------------------------------

    @handles(Generate)
    def generate(self, message: Generate, sender: str) -> None:
        """A request arrives, for the first time or again."""
        known = self.requests.get(message.rid)
        if known is not None:
            if known.attempt >= message.attempt:
                return
            self.batch.remove(known)
            del self.requests[known.rid]
        if not message.prompt or len(message.prompt) % 4 or len(message.output) % 4:
            raise BadMessage("token ids must be packed int32, and at least one in the prompt")
        refusal = self._refusal(message)
        if refusal is not None:
            self.send(sender, refusal)
            return
        self.arrivals += 1
        request = Request(message, sender, self.arrivals, self.config.page_size)
        self.requests[request.rid] = request
        self._open_text(request)
        finish = self._finish_reason(request)
        if finish is not None and (not request.wants_prompt_logprobs or request.prompt_len == 1):
            prompt = [TokenLogprob(request.tokens[0], None)] if request.wants_prompt_logprobs else None
            self._emit(request, [], None, prompt, finish)
        else:
            self.batch.add(request)

    @handles(Abort)
    def abort(self, message: Abort, sender: str) -> None:
        """The client is gone."""
        request = self.requests.get(message.rid)
        if request is not None:
            self._forget(request)

    @handles(Acknowledge)
    def acknowledge(self, message: Acknowledge, sender: str) -> None:
        """The ingress has all of these requests."""
        for rid in message.rids:
            request = self.requests.get(rid)
            if request is not None:
                self._forget(request)

    @handles(Resend)
    def resend(self, message: Resend, sender: str) -> None:
        """Tokens got lost behind this actor."""
        request = self.requests.get(message.rid)
        if request is not None and request.attempt >= message.attempt:
            self._replay(request)
        elif sender != self.config.detokenizer:
            self.send(sender, Unknown(message.rid, message.attempt))

    @handles(Stopped)
    def stopped(self, message: Stopped, sender: str) -> None:
        """The detokenizer has found a stop string; it has told the ingress."""
        request = self.requests.get(message.rid)
        if request is not None and request.attempt == message.attempt and request.finish is None:
            self._finish(request, "stop")

    def _refusal(self, message: Generate) -> Refused | None:
        length = len(message.prompt) // 4
        if length + message.sampling.max_tokens > self.config.max_model_len:
            text = (
                f"The prompt has {length} tokens and max_tokens is {message.sampling.max_tokens}; "
                f"together they must be at most {self.config.max_model_len}."
            )
            return Refused(message.rid, message.attempt, 400, text)
        free_slots = self.config.max_running - len(self.batch.running)
        if message.attempt == 0 and len(self.batch.waiting) >= self.config.max_queue + free_slots:
            text = f"The queue is full: {self.config.max_queue} requests are waiting. Try again later."
            return Refused(message.rid, message.attempt, 429, text, retry_after_s=1.0)
        return None

    # -- ranks ------------------------------------------------------------------------------------------

    def _ranks_died(self) -> None:
        """A request that kills its rank every time must not keep the others from their answers, nor must a prompt that
        takes longer than the ranks live: what was not answered is planned anew, in small steps."""
        rows = self.in_flight[0].rows if self.in_flight else []
        culprit = self.bisection.died([row.request for row in rows if row.live])
        self._undo_steps_ahead()
        self._start_slowly()
        if culprit is not None:
            logger.error("request %s is given up: the ranks die whenever they compute it", culprit.rid)
            text = "The engine crashed each time it computed this request, so the request was given up."
            self.send(culprit.owner, Refused(culprit.rid, culprit.attempt, 500, text))
            self._forget(culprit)

    def _start_slowly(self) -> None:
        """Short steps until some have been answered: where processes die often, long ones would never be."""
        self.batch.chunk_tokens = min(SLOW_START_TOKENS, self.config.chunk_tokens)

    def _undo_steps_ahead(self) -> None:
        """Takes unanswered steps back, so that their requests can be computed in other company or smaller parts.
        Guesses may be what the ranks died of, so there are no more of them for these requests."""
        for step in self.in_flight:
            for row in step.rows:
                if row.draft:
                    row.request.speculates = False
                if row.flags & SAMPLE:
                    row.request.pending -= 1
                if row.live:
                    row.request.scheduled = min(row.request.scheduled, row.request.computed)
        self.in_flight.clear()

    def _attach(self) -> None:
        self.attached = None
        self.heard_of_ranks = time.monotonic()
        self.send(self.config.leader, Attach())

    def _watch_ranks(self) -> None:
        """A step, its answer or an `Attach` may have been lost. The ranks answer `Attach` when their step has ended."""
        silent_s = time.monotonic() - self.heard_of_ranks
        limit_s = ATTACH_SILENCE_S if self.attached is None else RANK_SILENCE_S
        if (self.attached is None or self.in_flight) and silent_s > limit_s:
            logger.warning("no answer of %s for %.0f s", self.config.leader, silent_s)
            self._attach()

    @handles(Attached)
    def rank_attached(self, message: Attached, sender: str) -> None:
        """The ranks are at rest and know nothing: what was not answered is sent again."""
        config = self.config
        wanted = (config.num_pages, config.page_size, config.max_running)
        got = (message.num_pages, message.page_size, message.max_slots)
        if got != wanted:
            raise StartFailure(f"engine {config.engine}: its ranks have (pages, page size, slots) {got}, not {wanted}")
        self.attached = message
        self.heard_of_ranks = time.monotonic()
        if not self.ledger.match_epoch(message.kv_epoch):
            self._start_over()
        for request in list(self.batch.running):
            if request.wants_prompt_logprobs and request.computed:
                self.batch.retract(request)  # the next logprob needs a state that the ranks had kept
            elif request.lease is not None:
                request.lease.opened = False
        for step in list(self.in_flight):
            step.sent = None
            for row in step.rows:
                if not row.live and row.flags & SAMPLE:
                    row.request.pending -= 1
            step.rows = [row for row in step.rows if row.live]
            if step.rows:
                self.send(config.leader, encode_step(step.number, step.rows))
            else:
                self.in_flight.remove(step)

    def _start_over(self) -> None:
        """The KV pages are empty: everything is computed again."""
        self.in_flight.clear()
        self.pool = PagePool(self.ledger, self.config.prefix_cache)
        self.batch = Batch(self.config, self.pool, self.times, self.speculation)
        for request in self.requests.values():
            if request.finish is None:
                request.rewind()
                request.pending = 0
                self.batch.add(request)

    @handles(StepResult)
    def step_result(self, message: StepResult, sender: str) -> None:
        """A step has been computed. Answers to any but the oldest open step are repetitions. One counts also while
        `Attach` waits for the end of that very step."""
        if not self.in_flight or self.in_flight[0].number > message.number:
            return
        if self.in_flight[0].number < message.number:
            if self.attached is not None:
                self._attach()  # an answer has been lost
            return
        self.heard_of_ranks = time.monotonic()
        rows = self.in_flight[0].rows
        draws = sum(row.draws for row in rows)
        if len(message.tokens) != 4 * draws:
            raise BadMessage(f"step {message.number}: {len(message.tokens)} bytes for {draws} tokens")
        tokens = iter(np.frombuffer(message.tokens, dtype=np.int32).tolist())
        drawn = [list(islice(tokens, row.draws)) for row in rows]
        logprobs: dict[int, list[TokenLogprob]] = {}
        try:
            for entry in message.logprobs:
                known = logprobs.setdefault(entry.row, [])
                known += token_logprobs(entry, [drawn[entry.row][len(known)]])
            prompts = {e.row: token_logprobs(e, _row_tokens(rows[e.row])) for e in message.prompt_logprobs}
        except (ValueError, KeyError, IndexError) as error:
            raise BadMessage(f"step {message.number}: {error}") from None
        self._measure(self.in_flight.popleft(), message.duration_s)
        self.batch.chunk_tokens = min(2 * self.batch.chunk_tokens, self.config.chunk_tokens)
        self.bisection.answered([row.request for row in rows])
        for index, row in enumerate(rows):
            prompt = prompts.get(index) if row.flags & PROMPT_LOGPROBS else None
            self._advance(row, drawn[index], logprobs.get(index), prompt)

    def _measure(self, step: InFlight, seconds: float) -> None:
        """Times of steps, for the choice of how large others should be."""
        self.times.observe(step.tokens, seconds)
        if self.speculation is not None and step.sent is not None:
            self.speculation.observe_pause(time.monotonic() - step.sent - seconds)

    def _advance(
        self,
        row: Row,
        drawn: list[int],
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[TokenLogprob] | None,
    ) -> None:
        """Books what a row has brought."""
        request = row.request
        if drawn:
            request.pending -= 1
        if request.finish is not None or self.requests.get(request.rid) is not request:
            return
        if prompt_logprobs is not None:
            request.prompt_logprobs += prompt_logprobs
        tokens = self._accepted(row, drawn) if row.draft else drawn
        for token in tokens:
            request.append(token)
        self.generated += len(tokens)
        self.batch.computed(row)
        if not tokens and (row.start + row.length < request.prompt_len or request.sampling.max_tokens):
            return
        prompt = request.prompt_logprobs or None if request.output_len <= 1 else None
        self._emit(request, tokens, logprobs and logprobs[: len(tokens)], prompt, self._finish_reason(request))

    def _accepted(self, row: Row, drawn: list[int]) -> list[int]:
        """What a row that verified guesses has brought: tokens up to the first wrong guess, or to one that ends the
        request. The row is cut to the tokens before them, whose KV is the request's."""
        assert self.speculation is not None
        tokens = self.speculation.accepted(row.draft, drawn)
        for count, token in enumerate(tokens, 1):
            if token in row.request.stop_token_ids:
                tokens = tokens[:count]
                break
        row.length = len(tokens)
        return tokens

    # -- text -------------------------------------------------------------------------------------------

    def _finish_reason(self, request: Request) -> FinishReason | None:
        length = len(request.tokens)
        if length > request.prompt_len and request.tokens[-1] in request.stop_token_ids:
            return "stop"
        if length >= request.max_len or length >= self.config.max_model_len:
            return "length"
        return None

    def _emit(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
    ) -> None:
        """Sends tokens of a request to the detokenizer, and ends it if they are its last."""
        if not request.events:
            self.prompt_tokens += request.prompt_len
            self.cached_tokens += request.cached_tokens
        event = TokenEvent(
            request.rid,
            request.attempt,
            request.output_len - len(tokens),
            tokens,
            finish,
            request.cached_tokens,
            logprobs,
            prompt_logprobs,
        )
        request.events.append(event)
        self.outbox.events.append(event)
        if finish is not None:
            self._finish(request, finish)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """No more tokens; kept until the ingress has them all."""
        request.finish = reason
        request.lookup = None
        self.batch.remove(request)
        self.finished.append((time.monotonic(), request.rid))

    def _forget(self, request: Request) -> None:
        self.batch.remove(request)
        del self.requests[request.rid]
        self.outbox.closes.append(request.rid)

    def _open_text(self, request: Request) -> None:
        stops = request.sampling.stop_token_ids
        opening = OpenText(
            request.rid, request.attempt, request.owner, request.text, stops, request.base, request.characters
        )
        self.outbox.opens.append(opening)

    def _replay(self, request: Request) -> None:
        """Hands the detokenizer a request from its beginning."""
        self._flush()
        self._open_text(request)
        self.outbox.events += request.events
        self._flush()

    def _flush(self) -> None:
        box = self.outbox
        if box.events or box.opens or box.closes:
            self.send(self.config.detokenizer, Tokens(box.events, box.opens, box.closes))
            self.outbox = Outbox()

    # -- regular work -----------------------------------------------------------------------------------

    def _register(self) -> None:
        if self.attached is None:
            return
        config, attached = self.config, self.attached
        info = EngineInfo(
            config.engine,
            config.role,
            self.name,
            config.address,
            config.model,
            attached.fingerprint,
            config.tp,
            config.page_size,
            config.num_pages,
            config.max_model_len,
            len(self.batch.waiting),
            len(self.batch.running),
        )
        self.send(config.bootstrap, Register(info))

    def _sweep(self) -> None:
        """Gives up requests whose time is over, and finished ones that nobody has acknowledged."""
        self._watch_ranks()
        now = time.monotonic()
        for request in list(self.requests.values()):
            if request.deadline is not None and now > request.deadline and request.finish is None:
                message = "The request took longer than its time limit."
                self.send(request.owner, Refused(request.rid, request.attempt, 408, message))
                self._forget(request)
        while self.finished and now - self.finished[0][0] > KEEP_FINISHED_S:
            _, rid = self.finished.popleft()
            kept = self.requests.get(rid)
            if kept is not None and kept.finish is not None:
                self._forget(kept)


def _row_tokens(row: Row) -> list[int]:
    return row.request.tokens[row.start : row.start + row.length].tolist()
