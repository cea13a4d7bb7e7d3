"""What a traced request is at in a scheduler: it waits, is prefilled here or elsewhere, is decoded."""

from __future__ import annotations

import os
import time
from typing import Literal

from llm_runtime.actors.scheduler.request import BlockTable
from llm_runtime.actors.spans import SPAN_BYTES, Spans, SpanValue, child_context

Phase = Literal["queue", "prefill", "transfer", "decode"]


class Phases:
    """One span a phase, each reported as soon as it is over.

    Args:
        trace: context that came with the request.
        decodes: whether this engine draws more than the first token.

    Attributes:
        block_table: slot and pages of the present phase; with others the request has been retracted in between.
    """

    def __init__(self, spans: Spans, trace: bytes, decodes: bool = True) -> None:
        self._spans = spans
        self._decodes = decodes
        self._trace = trace
        self.block_table: BlockTable | None = None
        self._opened = False
        self._begin("queue")

    def _begin(self, phase: Phase) -> None:
        self.name = phase
        self.span = os.urandom(SPAN_BYTES)
        self._began_ns = time.time_ns()
        self._events: list[tuple[int, str]] = []

    @property
    def context(self) -> bytes:
        """For others who work on the present phase."""
        return child_context(self._trace, self.span)

    def enter(self, phase: Phase, block_table: BlockTable | None = None) -> None:
        """Ends the present phase and begins another."""
        self.end()
        if block_table is not None:
            self.block_table, self._opened = block_table, False
        self._begin(phase)

    def opened(self, block_table: BlockTable) -> None:
        """The ranks are about to be told of the request's slot: it begins to be computed, or the ranks were restarted
        meanwhile."""
        if self.block_table is not block_table:
            self.enter("prefill", block_table)
        elif self._opened:
            self._events.append((time.time_ns(), "handed to restarted ranks"))
        self._opened = True

    def drawn(self) -> None:
        """A token has been drawn."""
        if self.name == "prefill" and self._decodes:
            self.enter("decode")

    def end(self, attributes: dict[str, SpanValue] | None = None, error: str = "") -> None:
        """Reports the present phase."""
        self._spans.ended(
            self._trace,
            self.name,
            self._began_ns,
            attributes,
            span=self.span,
            events=self._events,
            error=error,
        )
