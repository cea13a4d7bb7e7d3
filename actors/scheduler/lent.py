"""Batches of an engine that computes prompts in pages of other engines."""

from __future__ import annotations

from bisect import insort

from llm_runtime.actors.scheduler.batch import Batch, Row
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.pages import PagePool
from llm_runtime.actors.scheduler.request import BlockTable, Request
from llm_runtime.actors.scheduler.step_times import StepTimes


class LentBatch(Batch):
    """A batch whose requests come with their pages, lent by the decode engines that own them: nothing is allocated,
    shared or freed here, and what the pages hold is in the ledger of their owner."""

    def __init__(self, config: Config, pool: PagePool, times: StepTimes) -> None:
        super().__init__(config, pool, times)
        self._lent: dict[Request, tuple[list[int], int]] = {}

    def lend(self, request: Request, pages: list[int], held: int) -> None:
        """A request waits. `pages` are those of its whole sequence, of which `held` tokens have their KV."""
        self._lent[request] = pages, held
        self.add(request)

    def computed(self, row: Row) -> None:
        request = row.request
        if row.live:
            request.computed = max(request.computed, row.start + row.length)
            request.scheduled = max(request.scheduled, request.computed)

    def release(self, request: Request) -> None:
        """Takes the slot from a running request."""
        if request.block_table is not None:
            self._slots.append(request.block_table.slot)
            self.running.remove(request)
            request.rewind()

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._lent.pop(request, None)

    def _start(self, request: Request, usable: bytes) -> BlockTable:
        pages, held = self._lent[request]
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.urgency)
        request.block_table = block_table = BlockTable(self._slots.pop(), list(pages))
        request.computed = request.scheduled = request.cached_tokens = held
        return block_table
