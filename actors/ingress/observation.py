"""What is told of an HTTP request once it has been answered: a figure, a span, a line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.spans import SpanValue

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status of a request whose client did not wait for the answer, as nginx has it."""


@contextmanager
def observed(service: Service, exchange: Exchange, public: bool = False, counted: bool = True) -> Iterator[None]:
    """Around the work on a request. `public`: one that monitoring asks all the time, of which nothing is told.
    `counted`: among the answers by status, where those to the status page would hide all others."""
    trace, work = None, exchange.work
    if service.tracing is not None and not public:
        trace = service.tracing.begin(work.identity, exchange.header(b"traceparent"), exchange.header(b"tracestate"))
        if trace is not None:
            work.trace = trace.context
    if service.recent is not None:
        exchange.on_body = partial(service.recent.begin, exchange)
    try:
        yield
    finally:
        if service.recent is not None:
            service.recent.end(exchange)
        if counted:
            service.metrics.response(exchange.status)
        status = exchange.status or CLIENT_GONE
        method, path, identity = exchange.scope["method"], exchange.scope["path"], work.identity
        if trace is not None and service.tracing is not None:
            attributes: dict[str, SpanValue] = {
                "http.request.method": method,
                "url.path": path,
                "http.response.status_code": status,
                "gen_ai.request.model": exchange.model or service.model.name,
                "runtime.request_id": exchange.request_id,
                "runtime.rid": identity.rid,
            }
            error = "" if status < 400 else f"status {status}"
            service.tracing.request_ended(trace, f"{method} {path}", attributes, error)
        if service.config.access_log and not public:
            seconds = time.monotonic() - identity.arrived_at
            logger.info(
                "%s %s %d %.3f s, request %s",
                *(method, path, status, seconds, exchange.request_id),
                extra={"request": identity.rid, "request_id": exchange.request_id, "status": status},
            )
