"""What a rank computes for traced requests: one span for a request's prompt and one for what it decodes after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_runtime.actors.messages import SAMPLE, Step
from llm_runtime.actors.spans import Spans, SpanValue

IDLE_NS = 1_000_000_000
"""A rank is not told that a request has ended: it has when no step has had it for so long."""


@dataclass(slots=True)
class _Slot:
    """A traced request that has a slot. Times: nanoseconds since 1970."""

    trace: bytes
    began_ns: int
    prompt_len: int
    phase: str = "rank prefill"
    ended_ns: int = 0
    busy_ns: int = 0
    steps: int = 0
    tokens: int = 0


class SlotTraces:
    """The traced requests of one rank, by their slots.

    Args:
        after: runs something once, some seconds from now.
    """

    def __init__(self, spans: Spans, after: Callable[[float, Callable[[], None]], None]) -> None:
        self._spans = spans
        self._after = after
        self._slots: dict[int, _Slot] = {}
        self._watching = False

    def __bool__(self) -> bool:
        return bool(self._slots)

    def ran(self, step: Step, began_ns: int) -> None:
        """A step has just been run."""
        ended_ns = time.time_ns()
        for opening in step.new_requests:
            self._end(opening.slot)
            if opening.trace:
                self._slots[opening.slot] = _Slot(opening.trace, began_ns, opening.prompt_len)
        if not self._slots:
            return
        starts, lengths = (np.frombuffer(each, dtype=np.int32) for each in (step.starts, step.lengths))
        for row, number in enumerate(np.frombuffer(step.slots, dtype=np.int32).tolist()):
            slot = self._slots.get(number)
            if slot is None:
                continue
            if not slot.steps and starts[row] >= slot.prompt_len:
                slot.phase = "rank decode"  # another engine has computed the prompt
            slot.began_ns = slot.began_ns or began_ns
            slot.ended_ns = ended_ns
            slot.busy_ns += ended_ns - began_ns
            slot.steps += 1
            slot.tokens += int(lengths[row])
            if slot.phase == "rank prefill" and step.flags[row] & SAMPLE:
                self._report(slot)
                self._slots[number] = _Slot(slot.trace, 0, slot.prompt_len, "rank decode", ended_ns)
        self._watch()

    def end_all(self) -> None:
        """The rank's slots are empty."""
        for number in list(self._slots):
            self._end(number)

    def _end(self, number: int) -> None:
        slot = self._slots.pop(number, None)
        if slot is not None and slot.steps:
            self._report(slot)

    def _report(self, slot: _Slot) -> None:
        attributes: dict[str, SpanValue] = {
            "steps": slot.steps,
            "tokens": slot.tokens,
            "busy_seconds": slot.busy_ns / 1e9,
        }
        self._spans.ended(slot.trace, slot.phase, slot.began_ns, attributes, ended_ns=slot.ended_ns)

    def _watch(self) -> None:
        if self._slots and not self._watching:
            self._watching = True
            self._after(IDLE_NS / 1e9, self._end_idle)

    def _end_idle(self) -> None:
        self._watching = False
        limit_ns = time.time_ns() - IDLE_NS
        for number, slot in list(self._slots.items()):
            if slot.ended_ns and slot.ended_ns < limit_ns:
                self._end(number)
        self._watch()
