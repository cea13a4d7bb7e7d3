"""What every actor tells its peers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from llm_runtime.actors.messages.base import AnyMessage, SpanId


class Hello(AnyMessage):
    """An actor → every peer, once it is ready: "what my former incarnation held is gone"."""


class ActorStats(AnyMessage):
    """An actor → every ingress, once a second: figures for /metrics."""

    incarnation: int
    figures: dict[str, float]


class SpanEnded(AnyMessage):
    """An actor → the ingress worker that exports it: what it did for a traced request, once that is over.

    Attributes:
        parent: span below which it belongs. start_ns, end_ns: since 1970. events: (nanoseconds since 1970, name).
        error: why it failed; empty if it did not.
    """

    trace: Annotated[bytes, Meta(min_length=16, max_length=16)]
    span: SpanId
    parent: SpanId
    name: Annotated[str, Meta(max_length=256)]
    start_ns: int
    end_ns: int
    attributes: dict[str, str | int | float | bool] = {}
    events: list[tuple[int, str]] = []
    error: str = ""
