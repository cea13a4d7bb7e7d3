"""The layers of a model as kernel graphs, for steps that are more than decoding: one for each range of sizes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime.actors.rank.models import Model
from llm_runtime.kernels import AttentionMeta, GraphMemory, KVCache, NotRecordable, SizedGraph

logger = logging.getLogger(__name__)

RANGES = (31, 63, 127, 255, 511)
"""The most tokens of each range. Beyond, what Python costs is little beside the work. None is a number of rows from
which on a layer is computed in another way (`kernels.cpu.paths.ROWS`): both recordings take the same."""


class HiddenGraphs:
    """`Model.hidden`, recorded for each range of sizes at first use.

    Args:
        page_table: int32 [slots, max_pages], whose content may change between steps.
        max_context: most positions that a row ever has.
        max_tokens: most tokens of a step.
    """

    def __init__(self, model: Model, cache: KVCache, page_table: Tensor, max_context: int, max_tokens: int) -> None:
        self._model = model
        self._cache = cache
        self._page_table = page_table
        self._max_context = max_context
        self._ranges = [most for most in RANGES if most <= max_tokens]
        rows = len(page_table)
        self._ids = torch.zeros(max(self._ranges, default=0), dtype=torch.int64)
        self._offsets = torch.zeros(rows + 1, dtype=torch.int32)
        self._starts, self._slots = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))
        # The same memory, to be filled.
        self._inputs = [each.numpy() for each in (self._ids, self._offsets, self._starts, self._slots)]
        self._memory = GraphMemory()
        self._graphs: dict[int, SizedGraph[Tensor]] = {}
        self._refused = False

    def run(
        self,
        ids: NDArray[np.int64],
        offsets: NDArray[np.int32],
        starts: NDArray[np.int32],
        slots: NDArray[np.int32],
    ) -> Tensor | None:
        """States [T, H] of the tokens ids [T] of n rows, valid until the next step; None for a size without a
        graph, or if this model cannot be recorded.

        offsets: [n + 1], where each row's tokens begin; starts, slots: [n], the position of its first token and its
        line of the page table.
        """
        n, tokens = len(slots), len(ids)
        most = next((most for most in self._ranges if tokens <= most), None)
        if most is None or self._refused or n < 1:
            return None
        graph = self._graphs.get(most) or self._record(most)
        if graph is None:
            return None
        step: tuple[NDArray[Any], ...] = (ids, offsets, starts, slots)
        for to, given in zip(self._inputs, step, strict=True):
            to[: len(given)] = given
        return graph.replay((tokens, n))[:tokens]

    def _record(self, most: int) -> SizedGraph[Tensor] | None:
        def hidden(sizes: tuple[int, ...]) -> Tensor:
            tokens, rows = sizes
            # Whatever depends on the longest rows is recorded for the longest there may be.
            meta = AttentionMeta(
                row_offsets=self._offsets[: rows + 1],
                row_starts=self._starts[:rows],
                row_slots=self._slots[:rows],
                page_table=self._page_table,
                num_tokens=tokens,
                max_query=most,
                max_context=self._max_context,
            )
            return self._model.hidden(self._ids[:tokens], meta, self._cache)

        rows = len(self._starts)
        try:
            graph = SizedGraph(hidden, self._memory, (most, rows), (most - 1, max(1, rows - 1)))
        except NotRecordable as reason:
            logger.info("steps are run without kernel graphs: %s", reason)
            self._refused = True
            return None
        self._graphs[most] = graph
        return graph
