"""Spans of sampled requests, as actors report them.

A request that is traced carries its trace context in the messages that hand it on: 16 bytes of trace id and 8 of the
span below which the receiver's own spans belong, as in W3C's `traceparent`; nothing for all other requests. An actor
sends a span to an ingress worker when it has ended, and the ingress exports it. So only the ingress knows the collector
and has a thread for it, and what an actor did before it was killed has left it already.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from llm_runtime.actors.messages import Message, SpanEnded

SpanValue = str | int | float | bool

TRACE_BYTES, SPAN_BYTES = 16, 8


class Spans:
    """Reports the spans of one actor.

    Args:
        incarnation: of the actor, an attribute of all of its spans.
        send: puts a message into an actor's mailbox, by name.
        ingresses: names of the ingress workers; all spans of a trace go to the same one.
    """

    def __init__(
        self, incarnation: int, send: Callable[[str, Message], bool], ingresses: Callable[[], Sequence[str]]
    ) -> None:
        self._incarnation = incarnation
        self._send = send
        self._ingresses = ingresses

    def ended(
        self,
        trace: bytes,
        name: str,
        began_ns: int,
        attributes: dict[str, SpanValue] | None = None,
        *,
        ended_ns: int = 0,
        span: bytes = b"",
        events: Sequence[tuple[int, str]] = (),
        error: str = "",
    ) -> None:
        """Reports a span.

        Args:
            trace: context that came with the request. Nothing is reported for an empty one.
            began_ns, ended_ns: nanoseconds since 1970; it ends now by default.
            span: its own id if others know it already.
            events: (nanoseconds since 1970, name).
            error: why it failed; empty if it did not.
        """
        ingresses = self._ingresses()
        if len(trace) != TRACE_BYTES + SPAN_BYTES or not ingresses:
            return
        message = SpanEnded(
            trace[:TRACE_BYTES],
            span or os.urandom(SPAN_BYTES),
            trace[TRACE_BYTES:],
            name,
            began_ns,
            ended_ns or time.time_ns(),
            {"runtime.incarnation": self._incarnation, **(attributes or {})},
            list(events),
            error,
        )
        self._send(ingresses[trace[0] % len(ingresses)], message)


def child_context(trace: bytes, span: bytes) -> bytes:
    """The context for whoever works below a span of the trace."""
    return trace[:TRACE_BYTES] + span
