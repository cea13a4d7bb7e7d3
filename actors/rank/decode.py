"""Decode steps as kernel graphs: the model on a few new tokens of each of n rows, one recorded graph for each size."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.rank.models import Model
from llm_runtime.actors.rank.sampler import Drawing
from llm_runtime.kernels import AttentionMeta, GraphMemory, KVCache, NotRecordable, SamplingTensors, StepGraph

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
        self._drawing: Drawing | None = None
        self._sampling = SamplingTensors.build([0.0] * rows)
        self._seeds, self._positions = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
        self._of_tokens = self._positions.numpy()
        self._memory = GraphMemory()
        self._graphs: OrderedDict[tuple[int, int, bool | None], StepGraph[tuple[Tensor, Tensor | None]]] = OrderedDict()
        self._refused = False

    def run(self, n: int, tokens: int, drawing: Drawing | None) -> tuple[Tensor, Tensor | None] | None:
        """Runs a step of n rows with T `tokens` in all, at least one in each.

        drawing: how each row draws its token, if all have one and draw it from the logits as they are.

        Returns the logits float32 [T, V] and what was drawn, int32 [T], both valid until the next step; None if this
        model's steps cannot be recorded.
        """
        greedy = None if drawing is None else drawing.params.all_greedy
        if drawing is not None and not greedy:
            self._draw_as(drawing, n)
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
        params = SamplingTensors.build([0.0] * n) if greedy else _first(self._sampling, n)

        def step() -> tuple[Tensor, Tensor | None]:
            logits = self._model.decode(ids, meta, self._cache)
            if greedy is None:
                return logits, None
            return logits, kernels.sample(logits, params, self._seeds[:n], self._positions[:n])

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

    def _draw_as(self, drawing: Drawing, n: int) -> None:
        self._of_tokens[:n] = self.starts[:n] + 1
        if drawing is self._drawing:
            return
        self._drawing = drawing
        self._seeds[:n] = drawing.seeds
        mine, theirs = self._sampling, drawing.params
        for name in ("temperature", "top_k", "top_p", "log_min_p"):
            getattr(mine, name)[:n] = getattr(theirs, name)

    def timed(self, n: int) -> list[tuple[str, float]]:
        """Runs the last greedy step of n rows and tokens again: each kernel's name and seconds; none before one."""
        graph = self._graphs.get((n, n, True))
        return [] if graph is None else list(zip(graph.names, graph.timed(), strict=True))


def _first(params: SamplingTensors, n: int) -> SamplingTensors:
    return SamplingTensors(
        params.temperature[:n], params.top_k[:n], params.top_p[:n], params.log_min_p[:n], all_greedy=False
    )
