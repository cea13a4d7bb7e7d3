"""What all messages have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

NonNegInt32 = Annotated[int, Meta(ge=0, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rid = Annotated[str, Meta(min_length=1, max_length=128)]
FinishReason = Literal["stop", "length", "abort"]
Trace = Annotated[bytes, Meta(max_length=24)]
"""Trace id (16 bytes) and span id (8) of the span below which the receiver's spans belong; empty for a request that is
not traced. See `actors.spans`."""
SpanId = Annotated[bytes, Meta(max_length=8)]


class Tagged(Struct, tag=True, array_like=True, gc=False):
    """Base of all messages: a MessagePack array whose first item names the type."""


class AnyMessage(Tagged):
    """Base of all messages."""
