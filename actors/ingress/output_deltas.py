"""What a request's answer is made from, in the form in which it is journalled."""

from __future__ import annotations

import os
import time

from msgspec import Struct

from llm_runtime.actors.messages import FinishReason, TextLogprob


class Identity(Struct, array_like=True, frozen=True, gc=False):
    """What is drawn for a request when it arrives, and cannot be drawn a second time.

    Attributes:
        rid: an identity that no other request has.
        arrived_at: `time.monotonic`, which is the same clock in all processes of a machine.
        created: seconds since 1970.
        seed: for a request that comes without one.
    """

    rid: str
    arrived_at: float
    created: int
    seed: int

    @staticmethod
    def draw() -> Identity:
        """A new one."""
        seed = int.from_bytes(os.urandom(8), "little") & (2**63 - 1)
        return Identity(new_rid(), time.monotonic(), int(time.time()), seed)


class OutputDelta(Struct, array_like=True, frozen=True, gc=False):
    """What has arrived of a choice at once, without what was known before; see `TextEvent`. Of a request that is
    embedded or classified, the `vector` (f32) of an input."""

    tokens: list[int]
    text: str
    logprobs: list[TextLogprob] | None
    finish: FinishReason | None
    stop_reason: str | int | None
    cached_tokens: int
    prompt_logprobs: list[TextLogprob] | None
    vector: bytes = b""


def new_rid() -> str:
    """An identity that nothing else has."""
    return os.urandom(12).hex()
