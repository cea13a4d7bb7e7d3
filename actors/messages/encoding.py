"""Between ingress and encoder."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, Rid


class TokenSequence(Struct, array_like=True, frozen=True, gc=False):
    """One input of a model that embeds or classifies.

    Attributes:
        place: its place among the inputs of the request.
        tokens: token ids (i32). types: token type ids, one byte a token, or nothing for zeros.
    """

    place: NonNegInt32
    tokens: bytes
    types: bytes = b""


class Embed(AnyMessage):
    """Ingress → encoder: make a vector of each sequence. Repeated, with the sequences that are not yet answered, when
    the encoder is restarted or silent; what is sent again takes the place of what the encoder has of the request.
    Answered by `Embedded`, or `EmbedRefused`; given up with `Abort`."""

    rid: Rid
    sequences: list[TokenSequence]


class Embedded(AnyMessage):
    """Encoder → ingress: vectors (f32, one after the other) of the sequences at these places (i32)."""

    rid: Rid
    places: bytes
    vectors: bytes


class EmbedRefused(AnyMessage):
    """Encoder → ingress: the request will not be served; as `Refused`."""

    rid: Rid
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str
    retry_after_s: float = 0.0
