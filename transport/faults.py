"""A mailbox that loses and delays what it sends, to test the protocols above it."""

from __future__ import annotations

import random
import time
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from llm_runtime.transport.mailbox import Mailbox

Body = TypeVar("Body")
Rate = Annotated[float, Meta(ge=0, lt=1)]


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to messages on purpose.

    Attributes:
        drop_rate: part of all messages that is lost.
        delay_rate: part of all messages before which the sender sleeps.
        delay_s: for up to so many seconds.
        seed: of the choice; each incarnation of each actor draws its own numbers from it.
    """

    drop_rate: Rate = 0.0
    delay_rate: Rate = 0.0
    delay_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    seed: int = 0


class FaultyMailbox(Mailbox[Body]):
    """A `Mailbox` with `Faults`. A lost message takes its sequence number with it, as if the network had lost it."""

    def __init__(self, faults: Faults, name: str, incarnation: int, *args: Any) -> None:
        super().__init__(name, incarnation, *args)
        self._faults = faults
        self._draw = random.Random(f"{faults.seed}/{name}/{incarnation}")

    def send(self, peer: str, body: Body) -> bool:
        """See `Mailbox.send`. What is lost counts as sent."""
        faults, draw = self._faults, self._draw
        if draw.random() < faults.delay_rate:
            time.sleep(draw.uniform(0, faults.delay_s))
        if draw.random() < faults.drop_rate:
            self.skip(peer)
            return True
        return super().send(peer, body)
