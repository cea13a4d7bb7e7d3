"""Decode steps as kernel graphs: the model on one new token of each of n rows, one recorded graph for each n."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor

import kernels
from actors.rank.models import Llama
from kernels import AttentionMeta, GraphMemory, NotRecordable, SamplingTensors, StepGraph

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Graphs that are kept; each is some hundred arguments, and the memory is shared."""


class DecodeGraphs:
    """Graphs of a model's decode steps, recorded at first use.

    Args:
        page_table: int32 [slots, max_pages], whose content may change between steps.
        max_context: most positions that a row ever has.

    Attributes:
        ids: int64 [slots]; starts, slots: int32 [slots]. The first n of each are what the next step of n rows reads:
            the token, its position, and the line of the page table.
    """

    def __init__(self, model: Llama, cache: Tensor, page_table: Tensor, max_context: int) -> None:
        self._model = model
        self._cache = cache
        self._page_table = page_table
        self._max_context = max_context
        rows = len(page_table)
        self._ids = torch.zeros(rows, dtype=torch.int64)
        self._starts, self._slots = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))
        self._offsets = torch.arange(rows + 1, dtype=torch.int32)
        self.ids, self.starts, self.slots = (each.numpy() for each in (self._ids, self._starts, self._slots))
        self._memory = GraphMemory()
        self._graphs: OrderedDict[tuple[int, bool], StepGraph[tuple[Tensor, Tensor | None]]] = OrderedDict()
        self._refused = False

    def run(self, n: int, greedy: bool) -> tuple[Tensor, Tensor | None] | None:
        """The logits float32 [n, V] of a step and, if `greedy`, the most likely tokens int32 [n]; valid until the next.

        None if this model's steps cannot be recorded.
        """
        graph = self._graphs.get((n, greedy))
        if graph is not None:
            self._graphs.move_to_end((n, greedy))
            return graph.replay()
        if self._refused:
            return None
        ids = self._ids[:n]
        # Whatever depends on the longest context is recorded for the longest there may be.
        meta = AttentionMeta(
            row_offsets=self._offsets[: n + 1],
            row_starts=self._starts[:n],
            row_slots=self._slots[:n],
            page_table=self._page_table,
            num_tokens=n,
            max_query=1,
            max_context=self._max_context,
        )
        most_likely = SamplingTensors.build([0.0] * n)

        def step() -> tuple[Tensor, Tensor | None]:
            logits = self._model.decode(ids, meta, self._cache)
            return logits, kernels.sample(logits, most_likely, ids, ids) if greedy else None

        try:
            graph = StepGraph(step, self._memory)
        except NotRecordable as reason:
            logger.info("decode steps are run without kernel graphs: %s", reason)
            self._refused = True
            return None
        self._graphs[n, greedy] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph.result

    def timed(self, n: int) -> list[tuple[str, float]]:
        """Runs the last greedy step of n rows again: each kernel's name and seconds, in order; none before one."""
        graph = self._graphs.get((n, True))
        return [] if graph is None else list(zip(graph.names, graph.timed(), strict=True))
