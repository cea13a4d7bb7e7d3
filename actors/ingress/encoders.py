"""What encoders have been asked and have not answered: sequences are asked for again until each has its vector."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.metrics import RequestMetrics
from llm_runtime.actors.ingress.output_deltas import OutputDelta
from llm_runtime.actors.ingress.work import Work
from llm_runtime.actors.messages import Abort, Embed, Embedded, EmbedRefused, Message, TokenSequence

MAX_STALL_S = 60.0
REFUSED_AGAIN_S = 0.5
"""How long to wait when an encoder has no room for a request that it has had before."""


class _Request:
    """The sequences of one HTTP request."""

    __slots__ = ("answer", "ask_at", "asked", "encoder", "missing", "rid", "stall_s", "vectors", "work")

    def __init__(self, work: Work, missing: dict[int, TokenSequence], answer: asyncio.Future[None]) -> None:
        self.rid = work.identity.rid
        self.work = work
        self.missing = missing
        self.vectors: dict[int, bytes] = {}
        self.answer = answer
        self.encoder = ""
        self.asked = 0
        self.ask_at = 0.0
        self.stall_s = 0.0


class Encoders:
    """The encoders of this ingress's model. Only for its event loop.

    Args:
        send: puts a message into an actor's mailbox, by name.
        names: the encoders; none if the model does not embed or classify.
        stall_s: a request without any progress for so long is asked for again; doubles up to a minute.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        send: Callable[[str, Message], bool],
        names: Sequence[str],
        metrics: RequestMetrics,
        stall_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._send = send
        self._names = list(names)
        self._metrics = metrics
        self._stall_s = stall_s
        self._clock = clock
        self._requests: dict[str, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    async def vectors(self, work: Work, sequences: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The vector (f32) of each sequence.

        What an earlier incarnation of this worker has received is not asked for again.

        Args:
            work: the HTTP request, which asks once.
            sequences: token ids (i32), and token type ids, one byte each, or nothing for zeros.

        Raises ApiError when the encoder has no room.
        """
        missing = {place: TokenSequence(place, tokens, types) for place, (tokens, types) in enumerate(sequences)}
        request = _Request(work, missing, asyncio.get_running_loop().create_future())
        for place, piece in (each for group in work.old for each in group):
            self._take(request, place, piece.vector)
        if missing:
            self._requests[request.rid] = request
            self._ask(request, elsewhere=True)
            try:
                await request.answer
            except BaseException:
                self._send(request.encoder, Abort(request.rid))
                self._metrics.counters["num_aborted_requests"] += 1
                raise
            finally:
                del self._requests[request.rid]
        counters = self._metrics.counters
        counters["num_requests"] += 1
        counters["prompt_tokens"] += sum(len(tokens) // 4 for tokens, _ in sequences)
        self._metrics.e2e_latency.observe(self._clock() - work.identity.arrived_at)
        return [request.vectors[place] for place in range(len(sequences))]

    # -- from the mailbox -----------------------------------------------------------------------------------------

    def answered(self, message: Embedded) -> None:
        """Vectors have arrived. Those that were there before are dropped."""
        request = self._requests.get(message.rid)
        places = array("i", message.places)
        if request is None or not places or len(message.vectors) % (4 * len(places)):
            self._metrics.counters["repeats"] += 1
            return
        size = len(message.vectors) // len(places)
        for number, place in enumerate(places):
            if place in request.missing:
                vector = message.vectors[number * size : (number + 1) * size]
                request.work.received(place, OutputDelta([], "", None, None, None, 0, None, vector))
                self._take(request, place, vector)
        request.stall_s = self._stall_s
        request.ask_at = self._clock() + request.stall_s
        if not request.missing and not request.answer.done():
            request.answer.set_result(None)

    def refused(self, message: EmbedRefused) -> None:
        """An encoder will not serve a request. One that it has had before is asked for again, as it was promised."""
        request = self._requests.get(message.rid)
        if request is None or request.answer.done():
            return
        if message.status in (429, 503) and (request.asked > 1 or request.vectors):
            request.ask_at = self._clock() + max(message.retry_after_s, REFUSED_AGAIN_S)
            return
        request.answer.set_exception(ApiError(message.status, message.message, retry_after_s=message.retry_after_s))

    def encoder_started(self, encoder: str) -> None:
        """A new incarnation has none of what was asked of the former one. One that is heard of for the first time may
        be such a one; if not, something is computed twice."""
        for request in self._requests.values():
            if request.encoder == encoder:
                self._metrics.counters["recoveries"] += 1
                self._ask(request)

    # -- from timers ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Asks again for what makes no progress, whatever the reason."""
        now = self._clock()
        for request in self._requests.values():
            if now >= request.ask_at:
                self._metrics.counters["resends"] += 1
                stall_s = min(2 * request.stall_s, MAX_STALL_S)
                self._ask(request, elsewhere=True)
                request.stall_s = stall_s
                request.ask_at = now + stall_s

    def _ask(self, request: _Request, elsewhere: bool = False) -> None:
        """Sends what is missing, to the encoder with the least to do if `elsewhere`."""
        if elsewhere:
            load = dict.fromkeys(self._names, 0)
            for each in self._requests.values():
                if each is not request and each.encoder in load:
                    load[each.encoder] += len(each.missing)
            chosen = min(self._names, key=lambda name: load[name])
            if request.encoder not in ("", chosen):
                self._send(request.encoder, Abort(request.rid))
            request.encoder = chosen
        request.asked += 1
        request.stall_s = self._stall_s
        request.ask_at = self._clock() + request.stall_s
        self._metrics.counters["attempts"] += 1
        self._send(request.encoder, Embed(request.rid, list(request.missing.values())))

    def _take(self, request: _Request, place: int, vector: bytes) -> None:
        if vector and request.missing.pop(place, None) is not None:
            request.vectors[place] = vector
