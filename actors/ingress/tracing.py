"""Traces of requests, as the ingress begins them: W3C's `traceparent` and `tracestate` in, spans out.

All ids that the ingress gives are functions of the request's identity, which is journalled. So an ingress worker that
is started anew goes on with the trace of each request that it takes up, and knows the span of the attempt that its
former incarnation had under way.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from hashlib import blake2b
from typing import Protocol

from msgspec import Struct

from llm_runtime.actors.ingress.output_deltas import Identity
from llm_runtime.actors.messages import SpanEnded
from llm_runtime.actors.spans import SPAN_BYTES, TRACE_BYTES, SpanValue, child_context

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 1
MAX_TRACESTATE = 512
REMEMBERED = 4096
"""Traces whose `tracestate` is kept for spans that arrive late."""


class TracingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where spans go.

    Attributes:
        endpoint: URL of a collector that takes OTLP over HTTP.
        sample_rate: part of the requests without `traceparent` that is traced; the others do as it says.
        service_name: `service.name` of all spans.
        node: `service.namespace` of all spans.
    """

    endpoint: str
    sample_rate: float = 1.0
    service_name: str = "llm-runtime"
    node: str = ""


class Exporter(Protocol):
    """Takes spans to the collector, on a thread of its own. A failure is its own affair."""

    def export(self, actor: str, span: SpanEnded, tracestate: str, server: bool) -> None:
        """Queues a span of an actor; `server` for one that answers a client."""

    def close(self) -> None:
        """Sends what is queued, for a moment."""


class RequestTrace:
    """The trace of one HTTP request.

    Attributes:
        context: for whoever works below the request's span.
        began_ns: when it arrived, since 1970.
    """

    __slots__ = ("_parent", "began_ns", "context", "events")

    def __init__(self, trace: bytes, parent: bytes, identity: Identity) -> None:
        self._parent = parent
        self.context = trace + _span_id(identity.rid)
        self.began_ns = since_1970_ns(identity.arrived_at)
        self.events: list[tuple[int, str]] = []

    @property
    def parent(self) -> bytes:
        """The client's span, empty if it has none."""
        return self._parent


class Tracing:
    """Begins traces, and exports the spans of this worker and those that actors send to it."""

    def __init__(self, config: TracingConfig, exporter: Exporter, actor: str, incarnation: int) -> None:
        self._config = config
        self._exporter = exporter
        self._actor = actor
        self._incarnation = incarnation
        self._states: OrderedDict[bytes, str] = OrderedDict()

    def begin(self, identity: Identity, traceparent: bytes, tracestate: bytes) -> RequestTrace | None:
        """The trace of a request with these headers; None if it is not sampled."""
        parent = _parse(traceparent)
        if parent is None:
            digest = blake2b(identity.rid.encode(), digest_size=TRACE_BYTES + 8, person=b"trace").digest()
            if int.from_bytes(digest[TRACE_BYTES:], "big") >= self._config.sample_rate * 2**64:
                return None
            return RequestTrace(digest[:TRACE_BYTES], b"", identity)
        trace, span, sampled = parent
        if not sampled:
            return None
        if tracestate and len(tracestate) <= MAX_TRACESTATE:
            self._states[trace] = tracestate.decode("latin-1")
            while len(self._states) > REMEMBERED:
                self._states.popitem(last=False)
        return RequestTrace(trace, span, identity)

    def request_ended(self, trace: RequestTrace, name: str, attributes: dict[str, SpanValue], error: str) -> None:
        """Exports the span of a whole request."""
        context = trace.context[:TRACE_BYTES] + trace.parent
        span = trace.context[TRACE_BYTES:]
        self._export(context, name, trace.began_ns, attributes, span, trace.events, error, server=True)

    def attempt_ended(
        self,
        trace: bytes,
        rid: str,
        attempt: int,
        began_ns: int,
        attributes: dict[str, SpanValue],
        events: list[tuple[int, str]],
        error: str,
    ) -> None:
        """Exports the span of one handing of a request to an engine; see `attempt_context`."""
        attributes = {"runtime.rid": rid, "runtime.attempt": attempt, **attributes}
        self._export(trace, "generate", began_ns, attributes, _span_id(rid, attempt), events, error)

    def received(self, actor: str, span: SpanEnded) -> None:
        """Exports the span of another actor."""
        self._exporter.export(actor, span, self._states.get(span.trace, ""), False)

    def close(self) -> None:
        """Exports what is queued, for a moment."""
        self._exporter.close()

    def _export(
        self,
        context: bytes,
        name: str,
        began_ns: int,
        attributes: dict[str, SpanValue],
        span: bytes,
        events: list[tuple[int, str]],
        error: str,
        server: bool = False,
    ) -> None:
        trace, parent = context[:TRACE_BYTES], context[TRACE_BYTES:]
        attributes = {"runtime.incarnation": self._incarnation, **attributes}
        message = SpanEnded(trace, span, parent, name, began_ns, time.time_ns(), attributes, events, error)
        self._exporter.export(self._actor, message, self._states.get(trace, ""), server)


def attempt_context(trace: bytes, rid: str, attempt: int) -> bytes:
    """The context for an engine that is handed a request."""
    return child_context(trace, _span_id(rid, attempt))


def since_1970_ns(monotonic_s: float) -> int:
    """Nanoseconds since 1970 at a time of the monotonic clock."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def _span_id(rid: str, attempt: int = -1) -> bytes:
    return blake2b(f"{rid}:{attempt}".encode(), digest_size=SPAN_BYTES, person=b"span").digest()


def _parse(traceparent: bytes) -> tuple[bytes, bytes, bool] | None:
    """Trace id, span id and whether it is sampled; None for what is not valid, which counts as absent."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    if match is None or match[1] == b"ff" or (match[1] == b"00" and len(traceparent.strip()) != 55):
        return None
    trace, span = bytes.fromhex(match[2].decode()), bytes.fromhex(match[3].decode())
    if not any(trace) or not any(span):
        return None
    return trace, span, bool(int(match[4], 16) & _SAMPLED)
