"""A collector of the spans that a node sends."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span of the collector; ids in hexadecimal, times in nanoseconds since 1970."""

    trace: str
    id: str
    parent: str
    name: str
    actor: str
    state: str
    start: int
    end: int
    error: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


class Collector:
    """A server that takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.content_types: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.content_types.add(self.headers["Content-Type"])
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            resource = {each.key: each.value.string_value for each in group.resource.attributes}
            assert resource["service.name"] == "llm-runtime"
            for scope in group.scope_spans:
                for span in scope.spans:
                    values = {each.key: each.value for each in span.attributes}
                    attributes = {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}
                    self.spans.append(
                        Span(
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.name,
                            resource["service.instance.id"],
                            span.trace_state,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.message,
                            attributes,
                            tuple(event.name for event in span.events),
                        )
                    )

    def trace(self, trace: str) -> list[Span]:
        """What has arrived of a trace, by time."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
