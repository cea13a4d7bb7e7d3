"""The ledger: the only truth about a request.

It holds what a request asks for and the tokens and text that have arrived, and accepts exactly the next token and the
next character. Whatever dies below, the ledger hands the request on again, and what is sent twice is cut here: so each
token reaches the client once. It knows nothing of HTTP, and does nothing by itself: messages and `watch` drive it.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec import structs

from llm_runtime.actors.ingress.engines import Engines
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.metrics import IngressMetrics
from llm_runtime.actors.ingress.output_deltas import OutputDelta
from llm_runtime.actors.ingress.tracing import Tracing, attempt_context, since_1970_ns
from llm_runtime.actors.messages import (
    Abort,
    Acknowledge,
    EngineInfo,
    FinishReason,
    Generate,
    Message,
    Refused,
    Resend,
    SamplingParams,
    TextEvent,
    TextLogprob,
    TextParams,
    Unknown,
)
from llm_runtime.actors.spans import SpanValue

logger = logging.getLogger(__name__)

MAX_STALL_S = 60.0
RESEND_INTERVAL_S = 0.25
"""Missing tokens of one request are asked for at most once in this time: the answer takes a while."""
REFUSED_AGAIN_S = 0.5
"""How long to wait at least when an engine has no room for a request that has been running before."""


class Listener(Protocol):
    """Who waits for a request's progress."""

    def received(self, entry: Entry, delta: OutputDelta) -> None:
        """A delta is about to be added to the entry."""

    def attempted(self, entry: Entry) -> None:
        """The entry is about to be handed to a scheduler again, under a new number."""

    def progressed(self, entry: Entry) -> None:
        """Tokens or text have arrived, or the request has finished."""

    def failed(self, entry: Entry, error: ApiError) -> None:
        """The request will not be finished; the ledger has dropped it."""


class Entry:
    """One request, or one of the n choices of a request.

    Attributes:
        prompt: token ids (i32).
        index: its place among the choices of the HTTP request.
        output: token ids received so far.
        characters: length of the text received so far.
        arrived_at: when the HTTP request arrived, by the ledger's clock.
        deadline: when it is given up; 0 for never.
        scheduler: who has the request; None while no engine is known.
        attempt: how often it was handed to a scheduler before.
        finish: why it ended, None while it is live.
        prompt_logprobs: once they have arrived.
        trace: context of the trace that it belongs to; empty if it is not traced.
        model: what the engine must serve; empty for any.
        whole: nobody reads the answer before it is complete.
        placed_ns: when it was handed to the scheduler, since 1970, if it is traced. events: since then.
    """

    __slots__ = (
        "_logprobs",
        "_taken",
        "_texts",
        "arrived_at",
        "attempt",
        "cached_tokens",
        "characters",
        "deadline",
        "events",
        "extra_key",
        "finish",
        "index",
        "listener",
        "model",
        "output",
        "placed_ns",
        "priority",
        "progressed_at",
        "prompt",
        "prompt_logprobs",
        "resend_at",
        "retry_at",
        "rid",
        "sampling",
        "scheduler",
        "stall_s",
        "stalls_at",
        "stop_reason",
        "text",
        "trace",
        "whole",
    )

    def __init__(
        self,
        rid: str,
        index: int,
        prompt: bytes,
        sampling: SamplingParams,
        text: TextParams,
        listener: Listener,
        arrived_at: float,
        deadline: float = 0.0,
        priority: int = 0,
        extra_key: str = "",
        trace: bytes = b"",
        model: str = "",
        whole: bool = False,
    ) -> None:
        self.rid = rid
        self.index = index
        self.prompt = prompt
        self.sampling = sampling
        self.text = text
        self.listener = listener
        self.deadline = deadline
        self.priority = priority
        self.extra_key = extra_key
        self.trace = trace
        self.model = model
        self.whole = whole
        self.placed_ns = 0
        self.events: list[tuple[int, str]] = []
        self.output = array("i")
        self.characters = 0
        self.scheduler: str | None = None
        self.attempt = 0
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: list[TextLogprob] | None = None
        self.arrived_at = self.progressed_at = arrived_at
        self.stall_s = self.stalls_at = self.resend_at = self.retry_at = 0.0
        self._texts: list[str] = []
        self._logprobs: list[TextLogprob] = []
        self._taken = 0

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.prompt) // 4

    def append(self, delta: OutputDelta) -> None:
        """Adds what comes next."""
        self.output.extend(delta.tokens)
        if delta.text:
            self._texts.append(delta.text)
            self.characters += len(delta.text)
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.finish, self.stop_reason = delta.finish, delta.stop_reason

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids."""
        return array("i", self.prompt).tolist()

    def take(self) -> tuple[str, array[int], list[TextLogprob]]:
        """Text, tokens and logprobs that have arrived since the last call."""
        texts, tokens, logprobs = self._texts, self.output[self._taken :], self._logprobs
        self._taken += len(tokens)
        self._texts, self._logprobs = [], []
        return texts[0] if len(texts) == 1 else "".join(texts), tokens, logprobs


class Ledger:
    """All live requests of one ingress worker, in `live` by their rid.

    Args:
        send: puts a message into the mailbox of an actor, by name.
        engines: where requests can go.
        stall_s: a request without progress for so long is asked for again; doubles for each time, up to a minute.
        clock: seconds, monotonic.
        tracing: takes the spans of traced requests.
    """

    def __init__(
        self,
        send: Callable[[str, Message], bool],
        engines: Engines,
        metrics: IngressMetrics,
        stall_s: float,
        clock: Callable[[], float],
        tracing: Tracing | None = None,
    ) -> None:
        self.live: dict[str, Entry] = {}
        self._send = send
        self.engines = engines
        self._metrics = metrics
        self._stall_s = stall_s
        self._clock = clock
        self._tracing = tracing
        self._finished: dict[str, list[str]] = {}
        self._met: set[str] = set()

    # -- from the HTTP side ---------------------------------------------------------------------------------------

    def submit(self, entry: Entry) -> None:
        """Takes on a request. It waits here while no engine is known."""
        self.live[entry.rid] = entry
        if entry.trace and entry.attempt:
            entry.placed_ns = since_1970_ns(entry.arrived_at)
            entry.attempt -= 1
            self._trace(entry, "the ingress worker was restarted")
            entry.attempt += 1
        self._place(entry)

    def abort(self, entry: Entry) -> None:
        """Forgets a request whose client is gone or whose time is up, and has the engine free what it holds."""
        if self.live.pop(entry.rid, None) is None:
            return
        self._trace(entry, "aborted")
        self._count(entry, "num_aborted_requests")
        if entry.scheduler is not None:
            self._send(entry.scheduler, Abort(entry.rid))

    def end(self, entry: Entry) -> None:
        """Ends a request early, as somebody has asked: what has arrived is its answer."""
        delta = OutputDelta([], "", None, "abort", None, entry.cached_tokens, None)
        entry.listener.received(entry, delta)
        entry.append(delta)
        self.abort(entry)
        entry.listener.progressed(entry)

    # -- from other actors ----------------------------------------------------------------------------------------

    def texts(self, events: Iterable[TextEvent]) -> None:
        """New tokens and text of any number of requests."""
        now = self._clock()
        for event in events:
            entry = self.live.get(event.rid)
            if entry is None:
                self._metrics.of("").counters["repeats"] += 1
            elif event.attempt != entry.attempt:
                self._count(entry, "repeats")
            else:
                self._accept(entry, event, now)

    def refused(self, message: Refused) -> None:
        """An engine will not serve a request. One that has been running before is tried again, as its client was
        promised an answer; else the client is told."""
        entry = self.live.get(message.rid)
        if entry is None or message.attempt != entry.attempt:
            return
        if message.status in (429, 503) and (entry.attempt > 0 or entry.output):
            entry.retry_at = self._clock() + max(message.retry_after_s, REFUSED_AGAIN_S)
            return
        self._fail(entry, ApiError(message.status, message.message, retry_after_s=message.retry_after_s))

    def unknown(self, message: Unknown) -> None:
        """A scheduler has lost a request."""
        entry = self.live.get(message.rid)
        if entry is not None and message.attempt == entry.attempt:
            self._again(entry)

    def scheduler_started(self, scheduler: str) -> None:
        """A new incarnation of a scheduler has none of the requests that were sent to the former one.

        Whether there was a former one is not known when a scheduler is heard of for the first time: it is asked.
        """
        known = scheduler in self._met
        self._met.add(scheduler)
        for entry in [each for each in self.live.values() if each.scheduler == scheduler]:
            if known:
                self._again(entry)
            else:
                self._ask_for_missing(entry, self._clock())

    def registry(self, infos: list[EngineInfo]) -> None:
        """The engines that there are: requests that wait for one go out, those of a vanished one go to another."""
        self.engines.update(infos, self._clock())
        served: dict[str, bool] = {}
        for entry in list(self.live.values()):
            if entry.model not in served:
                served[entry.model] = self.engines.serve(entry.model)
            if not served[entry.model]:
                continue
            if entry.scheduler is None:
                self._place(entry)
            elif entry.scheduler not in self.engines:
                self._send(entry.scheduler, Abort(entry.rid))
                self._again(entry, elsewhere=True)

    # -- from timers ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Finds requests that make no progress, whatever the reason, and asks for them again."""
        now = self._clock()
        for entry in list(self.live.values()):
            if entry.retry_at:
                if now >= entry.retry_at:
                    self._again(entry, elsewhere=True)
            elif entry.scheduler is not None and now >= entry.stalls_at:
                entry.stall_s = min(2 * entry.stall_s, MAX_STALL_S)
                entry.stalls_at = now + entry.stall_s
                self._ask_for_missing(entry, now)

    def flush(self) -> None:
        """Tells each scheduler, in one message, which requests have arrived whole."""
        for scheduler, rids in self._finished.items():
            self._send(scheduler, Acknowledge(rids))
        self._finished.clear()

    # -- the rules ------------------------------------------------------------------------------------------------

    def _accept(self, entry: Entry, event: TextEvent, now: float) -> None:
        known_tokens = len(entry.output) - event.index
        known_characters = entry.characters - event.offset
        if known_tokens < 0 or known_characters < 0:
            if now >= entry.resend_at:
                self._ask_for_missing(entry, now)
            return
        tokens, text, logprobs = event.tokens, event.text, event.logprobs
        finish = event.finish
        if known_tokens or known_characters:
            if known_tokens > len(tokens) or known_characters > len(text):
                finish = None  # from before what is known: not the end
            if logprobs:
                logprobs = logprobs[known_tokens:]
            tokens, text = tokens[known_tokens:], text[known_characters:]
        prompt_logprobs = event.prompt_logprobs if entry.prompt_logprobs is None else None
        if not tokens and not text and finish is None and prompt_logprobs is None:
            self._count(entry, "repeats")
            return
        if finish == "abort":
            self._aborted(entry, now)
            return
        if tokens:
            self._observe_tokens(entry, len(tokens), now)
        stop_reason = event.stop_reason if finish is not None else None
        delta = OutputDelta(tokens, text, logprobs, finish, stop_reason, event.cached_tokens, prompt_logprobs)
        entry.listener.received(entry, delta)
        entry.append(delta)
        entry.stall_s = self._stall_s
        entry.stalls_at = now + self._stall_s
        if finish is not None:
            self._finish(entry, now)
        entry.listener.progressed(entry)

    def _aborted(self, entry: Entry, now: float) -> None:
        """The engine itself has ended the request: nobody here wants it any less."""
        timed_out = entry.deadline and now >= entry.deadline - 1.0
        self._fail(
            entry,
            ApiError(408, "The request took too long and was given up.", code="timeout")
            if timed_out
            else ApiError(503, "The engine gave the request up. Please send it again.", retry_after_s=1.0),
        )

    def _finish(self, entry: Entry, now: float) -> None:
        del self.live[entry.rid]
        self._trace(entry)
        assert entry.scheduler is not None  # only a scheduler that has the request makes tokens for it
        self._finished.setdefault(entry.scheduler, []).append(entry.rid)
        metrics = self._metrics.of(entry.model)
        metrics.e2e_latency.observe(now - entry.arrived_at)
        metrics.counters["num_requests"] += 1
        metrics.counters["prompt_tokens"] += entry.prompt_tokens
        metrics.counters["cached_tokens"] += entry.cached_tokens

    def _fail(self, entry: Entry, error: ApiError) -> None:
        del self.live[entry.rid]
        self._trace(entry, error.message)
        self._count(entry, "num_aborted_requests")
        entry.listener.failed(entry, error)

    def _again(self, entry: Entry, elsewhere: bool = False) -> None:
        """Hands a request on under a new number, so that nothing of the old attempt is taken for the new one's."""
        self._trace(entry, "handed on again")
        entry.attempt += 1
        entry.listener.attempted(entry)
        self._count(entry, "recoveries")
        if elsewhere:
            entry.scheduler = None
        self._place(entry)

    def _place(self, entry: Entry) -> None:
        if entry.scheduler is None:
            entry.scheduler = self.engines.choose(entry.model)
            if entry.scheduler is None:
                return
        now = self._clock()
        sampling = entry.sampling
        if entry.prompt_logprobs is not None and sampling.prompt_logprobs >= 0:
            sampling = structs.replace(sampling, prompt_logprobs=-1)
        entry.retry_at = 0.0
        entry.stall_s = self._stall_s
        entry.stalls_at = now + entry.stall_s
        entry.resend_at = now + RESEND_INTERVAL_S
        self._count(entry, "attempts")
        trace = b""
        if entry.trace:
            trace, entry.placed_ns = attempt_context(entry.trace, entry.rid, entry.attempt), time.time_ns()
        self._send(
            entry.scheduler,
            Generate(
                entry.rid,
                entry.attempt,
                entry.prompt,
                sampling,
                entry.text,
                output=entry.output.tobytes(),
                characters=entry.characters,
                priority=entry.priority,
                extra_key=entry.extra_key,
                timeout_s=max(0.001, entry.deadline - now) if entry.deadline else 0.0,
                trace=trace,
                whole=entry.whole,
            ),
        )

    def _trace(self, entry: Entry, error: str = "") -> None:
        """Exports the span of a traced request's present attempt, which is over."""
        if self._tracing is None or not entry.trace or not entry.placed_ns:
            return
        attributes: dict[str, SpanValue] = {
            "runtime.scheduler": entry.scheduler or "",
            "gen_ai.usage.input_tokens": entry.prompt_tokens,
            "gen_ai.usage.output_tokens": len(entry.output),
            "runtime.cached_tokens": entry.cached_tokens,
            "gen_ai.response.finish_reasons": entry.finish or "",
        }
        self._tracing.attempt_ended(
            entry.trace, entry.rid, entry.attempt, entry.placed_ns, attributes, entry.events, error
        )
        entry.placed_ns, entry.events = 0, []

    def _ask_for_missing(self, entry: Entry, now: float) -> None:
        if entry.scheduler is None:
            return
        entry.resend_at = now + RESEND_INTERVAL_S
        self._count(entry, "resends")
        self._send(entry.scheduler, Resend(entry.rid, entry.attempt))

    def _count(self, entry: Entry, name: str) -> None:
        self._metrics.of(entry.model).counters[name] += 1

    def _observe_tokens(self, entry: Entry, count: int, now: float) -> None:
        metrics = self._metrics.of(entry.model)
        if not entry.output:
            metrics.time_to_first_token.observe(now - entry.arrived_at)
            if entry.trace:
                entry.events.append((time.time_ns(), "first token"))
            count_between = count - 1
        else:
            count_between = count
        if count_between:
            metrics.inter_token_latency.observe((now - entry.progressed_at) / count, count_between)
        metrics.counters["generation_tokens"] += count
        entry.progressed_at = now
