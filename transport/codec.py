"""Messages as bytes: one MessagePack array a message, decoded and validated against a closed set of types."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

Body = TypeVar("Body")

DEFAULT_MAX_BYTES = 32 * 2**20


class MalformedMessage(ValueError):
    """The bytes are not a message of the expected types."""


class OversizedMessage(ValueError):
    """The message is larger than the codec's limit."""


class Envelope(msgspec.Struct, Generic[Body], array_like=True, frozen=True, gc=False):
    """What every frame on a mailbox holds.

    `incarnation` counts how often the sender has been started; `seq` counts the frames that this
    incarnation has sent to this receiver, from 0.
    """

    sender: str
    incarnation: int
    seq: int
    body: Body


class Codec(Generic[Body]):
    """Encodes and decodes envelopes around one union of tagged `msgspec.Struct` types.

    Decoding validates every field against its declared type and constraints. There is no
    fallback to arbitrary objects: a type that is not in the union cannot be named on the wire.
    """

    def __init__(self, body_types: Any, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Envelope[body_types]).decode

    def encode(self, sender: str, incarnation: int, seq: int, body: Body) -> bytes:
        """One frame. Raises OversizedMessage when it would be over the limit."""
        frame = self._encode((sender, incarnation, seq, body))
        if len(frame) > self.max_bytes:
            raise OversizedMessage(
                f"a {type(body).__name__} of {len(frame)} bytes is over the limit of {self.max_bytes} bytes"
            )
        return frame

    def decode(self, frame: bytes) -> Envelope[Body]:
        """The envelope in a frame. Raises OversizedMessage or MalformedMessage; never anything else."""
        if len(frame) > self.max_bytes:
            raise OversizedMessage(f"a frame of {len(frame)} bytes is over the limit of {self.max_bytes} bytes")
        try:
            return self._decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
            raise MalformedMessage(str(error)) from None
