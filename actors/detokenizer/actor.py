"""The detokenizer actor.

Its state is soft: a scheduler opens each request here, with what the client's ingress already has, and opens it anew
whenever anything was lost. Tokens are taken in order only: repeats are dropped, and for a gap, or a request that is
not known, the scheduler is asked to open it again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llm_runtime.actors.actor import Actor, StartFailure, handles
from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.detokenizer.stream import Pieces, TextStream
from llm_runtime.actors.messages import (
    OpenText,
    Resend,
    Stopped,
    TextEvent,
    TextLogprob,
    Texts,
    TokenEvent,
    TokenLogprob,
    Tokens,
)
from llm_runtime.actors.spans import SpanValue
from llm_runtime.actors.vocabulary import load_vocabulary, unpack_ids

logger = logging.getLogger(__name__)

_ASK_INTERVAL_S = 0.5
"""A scheduler is asked for one request at most this often."""
_MAX_ASKED = 4096

Outbox = defaultdict[str, list[TextEvent]]


class DetokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the detokenizer.

    Attributes:
        model: GGUF file or Hugging Face directory.
        max_requests: requests whose text is kept; beyond that the oldest is forgotten.
    """

    model: str
    max_requests: int = 65_536


class _Request(msgspec.Struct):
    """A request as its scheduler has opened it.

    Attributes:
        owner: the scheduler.
        stop_ids: token ids that are reported when they end the request: the ones asked for, EOS not among them.
        trace: the trace that it belongs to, empty if it is not traced. began_ns: when it was opened, since 1970.
        finished: its last event has been sent.
    """

    attempt: int
    owner: str
    reply_to: str
    stream: TextStream
    stop_ids: frozenset[int]
    keep_stop: bool
    trace: bytes = b""
    began_ns: int = 0
    finished: bool = False


class Detokenizer(Actor):
    """Answers `Tokens` with one `Texts` for each ingress."""

    def setup(self) -> None:
        """Loads the vocabulary."""
        self.config = msgspec.convert(self.args.config, DetokenizerConfig)
        try:
            vocabulary = load_vocabulary(Path(self.config.model))
        except CheckpointError as error:
            raise StartFailure(str(error)) from None
        self.eos_ids = frozenset(vocabulary.eos_ids)
        self.token_bytes = vocabulary.token_bytes
        self.pieces = {skip: Pieces.of(vocabulary, skip) for skip in (False, True)}
        self.requests: dict[str, _Request] = {}
        self.asked: dict[str, float] = {}
        self.resends = 0

    @handles(Tokens)
    def tokens(self, message: Tokens, sender: str) -> None:
        """Opens requests, turns tokens into text, closes requests; in this order."""
        outbox: Outbox = defaultdict(list)
        for opening in message.opens:
            self._open(opening, sender, outbox)
        requests = self.requests
        for event in message.events:
            request = requests.get(event.rid)
            if request is None or event.attempt != request.attempt:
                self._not_open(event, request, sender)
                continue
            stream = request.stream
            if event.index != stream.next or request.finished:
                rest = self._not_next(event, request)
                if rest is None:
                    continue
                event = rest
            offset = stream.sent
            if event.finish is None and event.logprobs is None and event.prompt_logprobs is None:
                text = stream.push(event.tokens)
                if stream.stop is None:
                    outbox[request.reply_to].append(
                        TextEvent(
                            event.rid, event.attempt, event.index, event.tokens, offset, text, None, None,
                            event.cached_tokens,
                        )
                    )  # fmt: skip
                    continue
            else:
                text = self._push_last(event, request) if event.finish is not None else stream.push(event.tokens)
            outbox[request.reply_to].append(self._full_event(event, request, offset, text))
        for rid in message.closes:
            closed = requests.pop(rid, None)
            if closed is not None and closed.trace:
                self._trace(closed, "closed before its end")
        for ingress, events in outbox.items():
            self.send(ingress, Texts(events))

    def stats(self) -> dict[str, float]:
        """Requests open, and how often a scheduler was asked to open one again."""
        return {"detokenizer_requests": float(len(self.requests)), "detokenizer_resends": float(self.resends)}

    def _open(self, opening: OpenText, sender: str, outbox: Outbox) -> None:
        known = self.requests.pop(opening.rid, None)
        if known is not None and known.attempt > opening.attempt:
            self.requests[opening.rid] = known
            return
        try:
            base = unpack_ids(opening.base)
        except ValueError:
            base = [-1]
        if any(token < 0 for token in base):
            self.bad_messages += 1
            about = {"request": opening.rid}
            logger.warning("request %s is not opened: its base is not packed token ids", opening.rid, extra=about)
            return
        stream = TextStream(self.pieces[opening.text.skip_special_tokens], opening.text, base, opening.characters)
        request = self.requests[opening.rid] = _Request(
            opening.attempt,
            sender,
            opening.reply_to,
            stream,
            frozenset(opening.stop_token_ids) - self.eos_ids,
            opening.text.no_stop_trim,
            opening.trace,
            time.time_ns() if opening.trace else 0,
        )
        if len(self.requests) > self.config.max_requests:
            del self.requests[next(iter(self.requests))]
        if stream.backlog or stream.stop is not None:
            event = TokenEvent(opening.rid, opening.attempt, len(base), [])
            outbox[opening.reply_to].append(self._full_event(event, request, opening.characters, stream.backlog))

    def _trace(self, request: _Request, error: str = "") -> None:
        """Reports what was done for a traced request, once."""
        attributes: dict[str, SpanValue] = {"tokens": request.stream.next, "characters": request.stream.sent}
        self.spans.ended(request.trace, "detokenize", request.began_ns, attributes, error=error)
        request.trace = b""

    def _push_last(self, event: TokenEvent, request: _Request) -> str:
        """The text of a request's last event. A stop token, which is its last token, is not text."""
        stream = request.stream
        trimmed = event.finish == "stop" and not request.keep_stop and bool(event.tokens)
        text = stream.push(event.tokens[:-1] if trimmed else event.tokens)
        if stream.stop is None:
            text += stream.finish()
        return text

    def _full_event(self, event: TokenEvent, request: _Request, offset: int, text: str) -> TextEvent:
        """The answer to an event that ends a request, or brings logprobs."""
        stop = request.stream.stop
        tokens, finish = event.tokens, event.finish
        reason: str | int | None = stop
        if stop is not None:
            tokens = tokens[: max(0, request.stream.next - event.index)]
            if finish is None:
                self.send(request.owner, Stopped(event.rid, event.attempt, request.stream.next - 1))
            finish = "stop"
        elif finish == "stop" and tokens and tokens[-1] in request.stop_ids:
            reason = tokens[-1]
        request.finished = finish is not None
        if request.finished and request.trace:
            self._trace(request)
        return TextEvent(
            event.rid,
            event.attempt,
            event.index,
            tokens,
            offset,
            text,
            finish,
            reason,
            event.cached_tokens,
            self._logprobs(event.logprobs and event.logprobs[: len(tokens)]),
            self._logprobs(event.prompt_logprobs),
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> list[TextLogprob] | None:
        if logprobs is None:
            return None
        spell = self._spell
        return [
            TextLogprob(
                each.token,
                spell(each.token),
                each.logprob,
                [(token, spell(token), logprob) for token, logprob in each.top],
            )
            for each in logprobs
        ]

    def _spell(self, token: int) -> bytes:
        return self.token_bytes[token] if token < len(self.token_bytes) else b""

    def _not_open(self, event: TokenEvent, request: _Request | None, sender: str) -> None:
        """An event of a request that is not open, or of another attempt."""
        if request is None or event.attempt > request.attempt:
            self._ask(sender, event)

    def _not_next(self, event: TokenEvent, request: _Request) -> TokenEvent | None:
        """What is new in an event that does not begin at the next token, or comes after the last one."""
        stream = request.stream
        if request.finished:
            if stream.stop is not None and self._may_ask(event.rid):  # the scheduler has not heard that it is over
                self.send(request.owner, Stopped(event.rid, event.attempt, stream.next - 1))
            return None
        if event.index > stream.next:
            self._ask(request.owner, event)
            return None
        known = stream.next - event.index
        if known > len(event.tokens) or (known == len(event.tokens) and event.finish is None):
            return None
        return msgspec.structs.replace(
            event,
            index=stream.next,
            tokens=event.tokens[known:],
            logprobs=event.logprobs and event.logprobs[known:],
        )

    def _ask(self, scheduler: str, event: TokenEvent) -> None:
        if self._may_ask(event.rid):
            self.resends += 1
            self.send(scheduler, Resend(event.rid, event.attempt))

    def _may_ask(self, rid: str) -> bool:
        now = time.monotonic()
        if now - self.asked.get(rid, 0.0) < _ASK_INTERVAL_S:
            return False
        if len(self.asked) >= _MAX_ASKED:
            self.asked = {rid: then for rid, then in self.asked.items() if now - then < _ASK_INTERVAL_S}
            if len(self.asked) >= _MAX_ASKED:
                return False
        self.asked[rid] = now
        return True
