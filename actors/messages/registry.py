"""Which engines there are: from schedulers to bootstrap, and from there to ingress and schedulers."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32


class EngineInfo(Struct, array_like=True, frozen=True, gc=False):
    """What an engine offers. `scheduler` is the name and `address` the mailbox of the actor that takes its requests (on
    other machines than its own, the address that the topology gives holds); `transfer` the KV sender of a prefill
    engine or the KV receiver of a decode engine."""

    engine: str
    role: Literal["unified", "prefill", "decode"]
    scheduler: str
    address: str
    model: str
    fingerprint: str
    tp: NonNegInt32
    page_size: NonNegInt32
    num_pages: NonNegInt32
    max_model_len: NonNegInt32
    waiting: NonNegInt32 = 0
    running: NonNegInt32 = 0
    transfer: str = ""


class Register(AnyMessage):
    """Scheduler → bootstrap, once a second and when either has been started."""

    engine: EngineInfo


class RegisterRefused(AnyMessage):
    """Bootstrap → scheduler: the engine is not listed; one sentence says why and what to do."""

    reason: str


class Registry(AnyMessage):
    """Bootstrap → every ingress and decode scheduler, when an engine comes, goes or changes, and once a second."""

    engines: list[EngineInfo]
