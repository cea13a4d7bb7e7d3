"""Spans to a collector, over OTLP. Only imported where tracing is asked for: it needs the extra `otel`."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from llm_runtime.actors.ingress.tracing import TracingConfig
from llm_runtime.actors.messages import SpanEnded

EXPORT_INTERVAL_MS = 500
EXPORT_TIMEOUT_S = 5.0
QUEUE_SPANS = 16_384
"""Spans that wait for a collector that does not answer; further ones are dropped."""
CLOSE_S = 1.0

_FLAGS = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("llm-runtime")


class OtlpExporter:
    """Sends spans in batches from a thread, which starts with the first object of this class: after the fork."""

    def __init__(self, config: TracingConfig) -> None:
        # What a collector's failures have to say is of no use every half second.
        for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace.export"):
            logging.getLogger(name).addFilter(_Seldom())
        self._config = config
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=config.endpoint, timeout=EXPORT_TIMEOUT_S),
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=EXPORT_INTERVAL_MS,
        )
        self._resource = lru_cache(maxsize=1024)(self._make_resource)

    def export(self, actor: str, span: SpanEnded, tracestate: str, server: bool) -> None:
        """See `Exporter`."""
        trace = int.from_bytes(span.trace, "big")
        state = TraceState.from_header([tracestate]) if tracestate else TraceState()
        parent = None
        if any(span.parent):
            parent = SpanContext(trace, int.from_bytes(span.parent, "big"), server, _FLAGS, state)
        readable = ReadableSpan(
            name=span.name,
            context=SpanContext(trace, int.from_bytes(span.span, "big"), False, _FLAGS, state),
            parent=parent,
            resource=self._resource(actor),
            attributes={"runtime.actor": actor, **span.attributes},
            events=[Event(name, timestamp=at) for at, name in span.events],
            kind=SpanKind.SERVER if server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=max(span.start_ns, span.end_ns),
            instrumentation_scope=_SCOPE,
        )
        self._processor.on_end(readable)

    def close(self) -> None:
        """See `Exporter`."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _make_resource(self, actor: str) -> Resource:
        config = self._config
        attributes = {"service.name": config.service_name, "service.instance.id": actor}
        return Resource(attributes | ({"service.namespace": config.node} if config.node else {}))


class _Seldom(logging.Filter):
    """Lets the first of many records through, and then those whose number is a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self._count += 1
        return self._count.bit_count() == 1
