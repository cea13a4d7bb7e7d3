"""What schedulers of all roles have in common: an engine's ranks, the steps that they are sent, and their deaths."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from itertools import islice

import msgspec
import numpy as np

from llm_runtime.actors.actor import Actor, Context, StartFailure, handles
from llm_runtime.actors.histogram import QUEUE_TIME_BOUNDS, Histogram
from llm_runtime.actors.messages import (
    PROMPT_LOGPROBS,
    SAMPLE,
    Attach,
    Attached,
    CacheFlushed,
    Compiled,
    EngineInfo,
    FlushCache,
    Hello,
    Profile,
    Register,
    RegisterRefused,
    SamplingParams,
    StepRefused,
    StepResult,
    TokenLogprob,
)
from llm_runtime.actors.scheduler.batch import Batch, Row
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.grammars import Grammars, Refusals
from llm_runtime.actors.scheduler.pages import PageLedger, PagePool
from llm_runtime.actors.scheduler.phases import Phases
from llm_runtime.actors.scheduler.poison import Bisection
from llm_runtime.actors.scheduler.request import Request
from llm_runtime.actors.scheduler.speculation import Speculation
from llm_runtime.actors.scheduler.step_times import StepTimes
from llm_runtime.actors.scheduler.wire import encode_step, token_logprobs
from llm_runtime.transport import Arena

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
REFUSAL_S = 0.25
"""How long the first incarnation waits to hear whether its engine fits to the others."""
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


class EngineScheduler(Actor):
    """Plans steps over the waiting queue, the running batch, the page pool and the prefix tree of one engine, and keeps
    its ranks busy with them. All soft state: a new incarnation is given the requests again and finds the pages in
    the ledger's arena."""

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
        self.speculation = Speculation(config, self.times) if config.speculation != "off" else None
        self.batch = self.new_batch()
        self.grammars = Grammars(config, self.send)
        self.requests: dict[str, Request] = {}
        self.in_flight: deque[InFlight] = deque()
        self.bisection = Bisection(config.poison_limit)
        self.depth = 2 if config.run_ahead else 1
        self.attached: Attached | None = None
        self.vocab_size: int | None = None
        """Known once the ranks have told."""
        self.refusal: str | None = None
        self.leader_incarnation: int | None = None
        self.leader_restarts = 0
        self.heard_of_ranks = time.monotonic()
        if self.incarnation > 1:
            self._start_slowly()
        self.steps = 0
        self.queue_time = Histogram(QUEUE_TIME_BOUNDS)
        self.arrivals = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    # -- what a role adds -------------------------------------------------------------------------------

    def new_batch(self) -> Batch:
        """An empty batch over the pool."""
        return Batch(self.config, self.pool, self.times, self.speculation)

    @abstractmethod
    def advance(
        self,
        row: Row,
        drawn: list[int],
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[TokenLogprob] | None,
    ) -> None:
        """Books what an answered row has brought. Rows of requests that are gone are among them."""

    @abstractmethod
    def refuse(self, request: Request, status: int, message: str) -> None:
        """Tells a request's owner that it is not served, and forgets it."""

    def planned(self) -> None:
        """Runs after each turn, when the steps that can be sent have been sent."""

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
        if self.config.role != "unified" and self.incarnation == 1:
            self._await_refusal()
        self.every(REGISTER_INTERVAL_S, self._register)
        self.every(SWEEP_INTERVAL_S, self.sweep)

    def turn(self) -> None:
        while self.attached is not None and self._may_send():
            on_trial = self.bisection.on_trial
            if on_trial is not None and self.in_flight:
                break
            rows = self.batch.next_rows(on_trial)
            if not rows:
                break
            self.steps = self.pool.last_step = self.steps + 1
            step = InFlight(self.steps, rows)
            if not self.in_flight:
                self.heard_of_ranks = step.sent = time.monotonic()
            self.in_flight.append(step)
            for row in rows:
                if not row.block_table.opened:
                    self.admitted(row)
            self.send(self.config.leader, encode_step(self.steps, rows, self.config.first_page))
        self.planned()

    def trace(self, request: Request) -> None:
        """Follows a request that has just arrived, if it is traced."""
        if request.trace:
            request.phases = Phases(self.spans, request.trace, self.config.role != "prefill")

    def admitted(self, row: Row) -> None:
        """A request has got a slot, or the ranks have to be told of it again."""
        request = row.request
        if not request.admitted:
            request.admitted = True
            self.queue_time.observe(time.monotonic() - request.arrived)
        if request.phases is not None:
            request.phases.opened(row.block_table)

    def sweep(self) -> None:
        """Runs once a second."""
        self._watch_ranks()
        self.grammars.repeat()

    def _may_send(self) -> bool:
        """Whether another step may be sent now."""
        if len(self.in_flight) >= self.depth:
            return False
        if not self.in_flight or self.speculation is None or self.batch.filled:
            return True
        return not self.in_flight[-1].speculative and not self.speculation.worth_waiting(self.batch.running)

    def peer_started(self, peer: str, incarnation: int) -> None:
        if peer == self.config.leader:
            if self.leader_incarnation is not None:
                self.leader_restarts += 1
                self._ranks_died()
                self._attach()
                self.grammars.leader_started()
            self.leader_incarnation = incarnation
        elif peer == self.config.bootstrap:
            self._register()
        elif peer == self.config.grammar:
            self._refuse_all(self.grammars.grammar_started(incarnation))

    def stats(self) -> dict[str, float]:
        pages = self.pool.num_pages
        return {
            "num_running_reqs": len(self.batch.running),
            "num_queue_reqs": len(self.batch.waiting),
            "token_usage": 1.0 - self.pool.available / pages,
            "num_used_tokens": (pages - self.pool.available) * self.config.page_size,
            "max_total_num_tokens": pages * self.config.page_size,
            "num_grammar_queue_reqs": sum(request.held for request in self.batch.waiting),
            "cache_hit_rate": self.cached_tokens / max(1, self.prompt_tokens),
            "prefix_tree_pages": self.pool.tree.total_pages,
            "free_pages": self.pool.free,
            "available_pages": self.pool.available,
            "restored_pages": self.pool.restored_pages,
            "steps": self.steps,
            "retractions": self.batch.retractions,
            **self.queue_time.figures("queue_time_seconds"),
            **(self.speculation.stats() if self.speculation else {}),
        }

    @handles(Hello)
    def hello(self, message: Hello, sender: str) -> None:
        """A peer is ready. If nothing was heard of the ranks before, their former incarnation may have died with the
        `Attach` that was sent to it."""
        if sender == self.config.leader and self.attached is None and not self.leader_restarts:
            self._attach()

    @handles(FlushCache)
    def flush_cache(self, message: FlushCache, sender: str) -> None:
        """Cached prefixes are forgotten, unless requests run, as in SGLang."""
        busy = sum(request.finish is None for request in self.requests.values())
        refusal = ""
        if busy:
            refusal = f"{self.name} has {busy} requests in progress: wait for them, or abort them."
        else:
            freed = self.pool.flush()
            logger.info("the cache is flushed: %d pages are free again", freed)
        self.send(sender, CacheFlushed(message.rid, refusal))

    @handles(Profile)
    def profile(self, message: Profile, sender: str) -> None:
        """The ranks answer it themselves."""
        self.send(self.config.leader, message)

    # -- constraints ------------------------------------------------------------------------------------

    @handles(Compiled)
    def compiled(self, message: Compiled, sender: str) -> None:
        """A constraint is possible, or ready, or neither."""
        self._refuse_all(self.grammars.compiled(message, sender))

    def _refuse_all(self, refusals: Refusals) -> None:
        for request, reason in refusals:
            if self.requests.get(request.rid) is request:
                self.refuse(request, 400, reason)

    def unknown_token(self, tokens: bytes, sampling: SamplingParams) -> str:
        """Why a sequence cannot be computed: it holds a token that the model, unlike its tokenizer, does not have. What
        comes before the ranks have told how many there are is looked at when they have."""
        size, named = self.vocab_size, [*sampling.logit_bias]
        if size is None:
            return ""
        if sampling.thinking is not None:
            named += sampling.thinking.closing
        ids = np.frombuffer(tokens, "<i4")
        for token in (int(ids.min()), int(ids.max()), max(named, default=0)):
            if not 0 <= token < size:
                return f"The request holds token {token}; the model has the tokens 0 to {size - 1} only."
        return ""

    # -- registry ---------------------------------------------------------------------------------------

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
            config.transfer,
        )
        self.send(config.bootstrap, Register(info))

    def _await_refusal(self) -> None:
        """Gives the bootstrap server a moment to say that this engine does not fit to those that are there: somebody
        who has just started it should learn that at once. Raises StartFailure if it says so."""
        deadline = time.monotonic() + REFUSAL_S
        while self.refusal is None and time.monotonic() < deadline and not self.link.shutdown_requested:
            self.mailbox.poll(REFUSAL_S / 10)
            self.drain()
        if self.refusal is not None:
            raise StartFailure(self.refusal)

    @handles(RegisterRefused)
    def register_refused(self, message: RegisterRefused, sender: str) -> None:
        """The engine is not listed and gets no requests. It goes on asking, for the other one may leave."""
        if message.reason != self.refusal:
            self.refusal = message.reason
            logger.error("%s", message.reason)

    # -- ranks ------------------------------------------------------------------------------------------

    def _ranks_died(self) -> None:
        """A request that kills its rank every time must not keep the others from their answers, nor must a prompt that
        takes longer than the ranks live: what was not answered is planned anew, in small steps."""
        rows = self.in_flight[0].rows if self.in_flight else []
        culprit = self.bisection.died([row.request for row in rows if row.live])
        self._undo_steps_ahead()
        self._start_slowly()
        if culprit is not None:
            about = {"request": culprit.rid}
            logger.error("request %s is given up: the ranks die whenever they compute it", culprit.rid, extra=about)
            text = "The engine crashed each time it computed this request, so the request was given up."
            self.refuse(culprit, 500, text)

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
        wanted = (config.arena_pages or config.num_pages, config.page_size, config.max_running)
        got = (message.num_pages, message.page_size, message.max_slots)
        if got != wanted:
            raise StartFailure(f"engine {config.engine}: its ranks have (pages, page size, slots) {got}, not {wanted}")
        self.attached = message
        unchecked, self.vocab_size = self.vocab_size is None, message.vocab_size
        self.heard_of_ranks = time.monotonic()
        if not self.ledger.match_epoch(message.kv_epoch):
            self.start_over()
        if unchecked:
            for request in list(self.requests.values()):
                if reason := self.unknown_token(request.tokens.tobytes(), request.sampling):
                    self.refuse(request, 400, reason)
        for request in list(self.batch.running):
            if request.wants_prompt_logprobs and request.computed and request.finish is None:
                self.batch.retract(request)  # the next logprob needs a state that the ranks had kept
            elif request.block_table is not None:
                request.block_table.opened = False
        if self.in_flight and not self.batch.fits([row.request for row in self.in_flight[0].rows]):
            self._undo_steps_ahead()
        for step in list(self.in_flight):
            step.sent = None
            for row in step.rows:
                if not row.live and row.flags & SAMPLE:
                    row.request.pending -= 1
            step.rows = [row for row in step.rows if row.live]
            if step.rows:
                self.send(config.leader, encode_step(step.number, step.rows, config.first_page))
            else:
                self.in_flight.remove(step)

    def start_over(self) -> None:
        """The KV pages are empty: everything is computed again."""
        self.in_flight.clear()
        self.pool = PagePool(self.ledger, self.config.prefix_cache)
        self.batch = self.new_batch()
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
            self._step_failed(f"step {message.number}: {len(message.tokens)} bytes for {draws} tokens")
            return
        tokens = iter(np.frombuffer(message.tokens, dtype=np.int32).tolist())
        drawn = [list(islice(tokens, row.draws)) for row in rows]
        logprobs: dict[int, list[TokenLogprob]] = {}
        try:
            for entry in message.logprobs:
                known = logprobs.setdefault(entry.row, [])
                known += token_logprobs(entry, [drawn[entry.row][len(known)]])
            prompts = {e.row: token_logprobs(e, _row_tokens(rows[e.row])) for e in message.prompt_logprobs}
        except (ValueError, KeyError, IndexError) as error:
            self._step_failed(f"step {message.number}: {error}")
            return
        self._measure(self.in_flight.popleft(), message.duration_s)
        self.batch.chunk_tokens = min(2 * self.batch.chunk_tokens, self.config.chunk_tokens)
        self.bisection.answered([row.request for row in rows])
        for index, row in enumerate(rows):
            if row.request.phases is not None and drawn[index]:
                row.request.phases.drawn()
            prompt = prompts.get(index) if row.flags & PROMPT_LOGPROBS else None
            self.advance(row, drawn[index], logprobs.get(index), prompt)

    @handles(StepRefused)
    def step_refused(self, message: StepRefused, sender: str) -> None:
        """The ranks make no sense of the oldest open step. They refuse it again however often it is sent, and with it
        those sent ahead, which go on where it would have ended."""
        if self.in_flight and self.in_flight[0].number == message.number:
            self._step_failed(message.reason, message.slots)

    def _step_failed(self, reason: str, slots: list[int] | None = None) -> None:
        """Ends the requests for whose sake the oldest open step cannot be computed, and has the others computed in
        other steps. Where nobody knows which requests these are, the step's are tried in parts."""
        requests = [row.request for row in self.in_flight[0].rows if row.live]
        guilty = [row.request for row in self.in_flight[0].rows if row.live and row.block_table.slot in (slots or ())]
        logger.error("%s cannot compute a step: %s", self.config.leader, reason)
        if not guilty:
            suspect = self.bisection.refused(requests) if requests else None
            guilty = [] if suspect is None else [suspect]
        self._undo_steps_ahead()
        self._attach()  # the ranks forget what they were told for the step
        for request in guilty:
            logger.error("request %s is given up", request.rid, extra={"request": request.rid})
            self.refuse(request, 500, f"The engine cannot compute this request ({reason}), so it was given up.")

    def _measure(self, step: InFlight, seconds: float) -> None:
        """Times of steps, for the choice of how large others should be."""
        self.times.observe(step.tokens, seconds)
        if self.speculation is not None and step.sent is not None:
            self.speculation.observe_pause(time.monotonic() - step.sent - seconds)


def _row_tokens(row: Row) -> list[int]:
    return row.request.tokens[row.start : row.start + row.length].tolist()
