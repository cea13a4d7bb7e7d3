"""Decode steps as kernel graphs: the model on a few new tokens of each of n rows, one recorded graph for each size."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor

import kernels
from actors.rank.models import Model
from kernels import AttentionMeta, GraphMemory, KVCache, NotRecordable, SamplingTensors, StepGraph

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Graphs that are kept; each is some hundred arguments, and the memory is shared."""


class DecodeGraphs:
    """Graphs of a model's decode steps, recorded at first use.

    Args:
        page_table: int32 [slots, max_pages], whose content may change between steps.
        max_context: most positions that a row ever has.
        max_tokens: most tokens of a step.

    Attributes:
        ids: int64 [max_tokens]; offsets: int32 [slots + 1]; starts, slots: int32 [slots]. What the next step reads, its
            own at the beginning of each: the tokens, where each row's begin, the position of its first, and its line
            of the page table.
    """

    def __init__(self, model: Model, cache: KVCache, page_table: Tensor, max_context: int, max_tokens: int) -> None:
        self._model = model
        self._cache = cache
        self._page_table = page_table
        self._max_context = max_context
        rows = len(page_table)
        self._ids = torch.zeros(max_tokens, dtype=torch.int64)
        self._starts, self._slots = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))
        self._offsets = torch.arange(rows + 1, dtype=torch.int32)
        self.ids, self.offsets = self._ids.numpy(), self._offsets.numpy()
        self.starts, self.slots = self._starts.numpy(), self._slots.numpy()
        self._memory = GraphMemory()
        self._graphs: OrderedDict[tuple[int, int, bool], StepGraph[tuple[Tensor, Tensor | None]]] = OrderedDict()
        self._refused = False

    def run(self, n: int, tokens: int, greedy: bool) -> tuple[Tensor, Tensor | None] | None:
        """Runs a step of n rows with T `tokens` in all, at least one in each.

        Returns the logits float32 [T, V] and, if `greedy`, the most likely tokens int32 [T], both valid until the next
        step; None if this model's steps cannot be recorded.
        """
        key = (n, tokens, greedy)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph.replay()
        if self._refused:
            return None
        ids = self._ids[:tokens]
        # Whatever depends on the longest context is recorded for the longest there may be.
        meta = AttentionMeta(
            row_offsets=self._offsets[: n + 1],
            row_starts=self._starts[:n],
            row_slots=self._slots[:n],
            page_table=self._page_table,
            num_tokens=tokens,
            max_query=tokens - n + 1,
            max_context=self._max_context,
        )
        most_likely = SamplingTensors.build([0.0] * tokens)

        def step() -> tuple[Tensor, Tensor | None]:
            logits = self._model.decode(ids, meta, self._cache)
            return logits, kernels.sample(logits, most_likely, ids, ids) if greedy else None

        try:
            graph = StepGraph(step, self._memory)
        except NotRecordable as reason:
            logger.info("decode steps are run without kernel graphs: %s", reason)
            self._refused = True
            return None
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph.result

    def timed(self, n: int) -> list[tuple[str, float]]:
        """Runs the last greedy step of n rows and tokens again: each kernel's name and seconds; none before one."""
        graph = self._graphs.get((n, n, True))
        return [] if graph is None else list(zip(graph.names, graph.timed(), strict=True))
