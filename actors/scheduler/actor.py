"""The scheduler of an engine that serves requests: from the ingresses to the ranks, tokens to the detokenizer."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from llm_runtime.actors.actor import Context, handles, role_of
from llm_runtime.actors.messages import (
    Abort,
    Acknowledge,
    FinishReason,
    Generate,
    OpenText,
    Refused,
    Resend,
    Stopped,
    TokenEvent,
    TokenLogprob,
    Tokens,
    Unknown,
)
from llm_runtime.actors.scheduler.batch import Row
from llm_runtime.actors.scheduler.engine import EngineScheduler
from llm_runtime.actors.scheduler.request import Request

KEEP_FINISHED_S = 300.0
"""How long a finished request is kept for an ingress that does not acknowledge it."""
GROUP_STEPS = 16
"""The tokens of answers that nobody reads before they are complete go on every so many steps, all requests' together:
a message wakes two processes, which would take the cores from the ranks."""


@dataclass(slots=True)
class Outbox:
    """What the present turn has for the detokenizer; sent as one message."""

    opens: list[OpenText] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    closes: list[str] = field(default_factory=list)


class Scheduler(EngineScheduler):
    """Owns the requests of one engine. A new incarnation gets them from the ingresses."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.finished: deque[tuple[float, str]] = deque()
        self.outbox = Outbox()
        self.group_ends = 0
        self.generated = 0
        self.throughput = 0.0
        self.measured = (time.monotonic(), 0)

    def planned(self) -> None:
        if self.steps >= self.group_ends:
            self._send_kept()
        self._flush()

    def peer_started(self, peer: str, incarnation: int) -> None:
        super().peer_started(peer, incarnation)
        if peer == self.config.detokenizer:
            for request in self.requests.values():
                self._replay(request)
        elif role_of(peer) == "ingress":
            for request in [request for request in self.requests.values() if request.owner == peer]:
                self.forget(request)

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "generation_tokens": self.generated, "gen_throughput": self.throughput}

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
            _end_phases(known, "handed on anew")
        refusal = self._refusal(message)
        if refusal is not None:
            self.send(sender, refusal)
            return
        self.arrivals += 1
        request = Request(message, sender, self.arrivals, self.config.page_size)
        self.requests[request.rid] = request
        self.trace(request)
        self._open_text(request)
        finish = self._finish_reason(request)
        if finish is not None and (not request.wants_prompt_logprobs or request.prompt_len == 1):
            prompt = [TokenLogprob(request.tokens[0], None)] if request.wants_prompt_logprobs else None
            self._emit(request, [], None, prompt, finish)
        elif reason := self.grammars.hold(request):
            self.refuse(request, 400, reason)
        else:
            self.batch.add(request)

    @handles(Abort)
    def abort(self, message: Abort, sender: str) -> None:
        """The client is gone."""
        request = self.requests.get(message.rid)
        if request is not None:
            self.forget(request)

    @handles(Acknowledge)
    def acknowledge(self, message: Acknowledge, sender: str) -> None:
        """The ingress has all of these requests."""
        for rid in message.rids:
            request = self.requests.get(rid)
            if request is not None:
                self.forget(request)

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

    def refuse(self, request: Request, status: int, message: str) -> None:
        """Ends a request with an error."""
        self.send(request.owner, Refused(request.rid, request.attempt, status, message))
        self.forget(request)

    def _refusal(self, message: Generate) -> Refused | None:
        length, odd = divmod(len(message.prompt), 4)
        if not length or odd or len(message.output) % 4:
            text = "Token ids must be packed int32, and at least one in the prompt."
            return Refused(message.rid, message.attempt, 400, text)
        unknown = self.unknown_token(message.prompt + message.output, message.sampling)
        if unknown:
            return Refused(message.rid, message.attempt, 400, unknown)
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
        if request.finish is not None or self.requests.get(request.rid) is not request:
            return
        if prompt_logprobs is not None:
            request.prompt_logprobs += prompt_logprobs
        tokens = self._accepted(row, drawn) if row.draft else drawn
        for count, token in enumerate(tokens, 1):
            request.append(token)
            if row.draft and request.repeats:
                tokens, row.length = tokens[:count], count
                break
        self.batch.computed(row)
        if tokens or (row.start + row.length >= request.prompt_len and not request.sampling.max_tokens):
            self.deliver(request, tokens, logprobs and logprobs[: len(tokens)])

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
        if length >= request.max_len or length >= self.config.max_model_len or request.repeats:
            return "length"
        return None

    def deliver(self, request: Request, tokens: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Sends on the tokens that a request has just got."""
        self.generated += len(tokens)
        finish = self._finish_reason(request)
        if request.whole and request.events and finish is None:  # the first one tells the time to it
            request.kept += tokens
            request.kept_logprobs += logprobs or []
            return
        prompt = request.prompt_logprobs or None if request.output_len <= 1 else None
        self._emit(request, tokens, logprobs, prompt, finish)

    def _emit(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
    ) -> None:
        """Sends tokens of a request to the detokenizer, after those kept, and ends it if they are its last."""
        if request.kept:
            tokens = request.kept + tokens
            logprobs = request.kept_logprobs + (logprobs or []) or None
            request.kept, request.kept_logprobs = [], []
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
        request.drafter = None
        _end_phases(request)
        self.batch.remove(request)
        self.finished.append((time.monotonic(), request.rid))

    def forget(self, request: Request) -> None:
        """Frees all that a request holds."""
        self.batch.remove(request)
        del self.requests[request.rid]
        _end_phases(request, "given up")
        self.outbox.closes.append(request.rid)

    def _open_text(self, request: Request) -> None:
        stops = request.sampling.stop_token_ids
        opening = OpenText(
            request.rid,
            request.attempt,
            request.owner,
            request.text,
            stops,
            request.base,
            request.characters,
            request.trace,
        )
        self.outbox.opens.append(opening)

    def _replay(self, request: Request) -> None:
        """Hands the detokenizer a request from its beginning."""
        if request.kept:
            self._emit(request, [], None, None, None)
        self._flush()
        self._open_text(request)
        self.outbox.events += request.events
        self._flush()

    def _send_kept(self) -> None:
        self.group_ends = self.steps + GROUP_STEPS
        for request in self.requests.values():
            if request.kept:
                self._emit(request, [], None, None, None)

    def _flush(self) -> None:
        box = self.outbox
        if box.events or box.opens or box.closes:
            self.send(self.config.detokenizer, Tokens(box.events, box.opens, box.closes))
            self.outbox = Outbox()

    # -- regular work -----------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Gives up requests whose time is over, and finished ones that nobody has acknowledged."""
        super().sweep()
        self._send_kept()
        now = time.monotonic()
        (then, generated), self.measured = self.measured, (now, self.generated)
        self.throughput = (self.generated - generated) / (now - then) if now > then else self.throughput
        for request in list(self.requests.values()):
            if request.deadline is not None and now > request.deadline and request.finish is None:
                message = "The request took longer than its time limit."
                self.refuse(request, 408, message)
        while self.finished and now - self.finished[0][0] > KEEP_FINISHED_S:
            _, rid = self.finished.popleft()
            kept = self.requests.get(rid)
            if kept is not None and kept.finish is not None:
                self.forget(kept)


def _end_phases(request: Request, error: str = "") -> None:
    """Reports the last phase of a traced request."""
    if request.phases is not None:
        request.phases.end({"tokens": request.output_len, "cached_tokens": request.cached_tokens}, error)
        request.phases = None
