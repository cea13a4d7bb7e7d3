"""Decode steps on CUDA devices: a recorded graph for each of a few numbers of rows, and others padded to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from actors.rank.models import Model
from kernels import AttentionMeta, KVCache, SamplingTensors

Outcome = tuple[Tensor, Tensor]
"""Logits float32 [n, V], and the most likely tokens int32 [n]."""
Record = Callable[[Callable[[], Outcome]], Callable[[], Outcome]]
"""Makes something that repeats a function's kernels."""

MOST_ROWS = 512
"""Larger steps keep a device busy without a graph."""


def padded_sizes(most: int) -> list[int]:
    """The numbers of rows for which there are graphs: 1, 2, 4, 8, and then steps of 8, and later of a quarter."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 32 * 8))
    return [size for size in sizes if size < most] + [most]


class PaddedDecode:
    """Graphs of a model's decode steps, recorded when this is made.

    A step of fewer rows than its graph has is filled up with copies of its shortest row: they write what that row
    writes, where it writes it, and no kernel needs to know of them.

    Args:
        page_table: int32 [slots, max_pages], whose content may change between steps. Recording overwrites the first
            page of each slot, and of the cache.
        max_context: most positions that a row ever has.
        record: see `Record`; CUDA graphs that share their memory if None.

    Attributes:
        ids: int64 [slots]; offsets: int32 [slots + 1]; starts, slots: int32 [slots]. What the next step reads, its own
            at the beginning of each, as in `DecodeGraphs`.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        page_table: Tensor,
        max_context: int,
        record: Record | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._page_table = page_table
        self._max_context = max_context
        slots = len(page_table)
        self._sizes = padded_sizes(min(slots, MOST_ROWS))
        # One buffer on the host and one on the device: a step copies once.
        lengths = [8 * slots, 4 * (slots + 1), 4 * slots, 4 * slots]
        device = page_table.device
        self._host = torch.zeros(sum(lengths), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
        ids, *others = self._host.split(lengths)
        self.ids = ids.view(torch.int64).numpy()
        self.offsets, self.starts, self.slots = (each.view(torch.int32).numpy() for each in others)
        self._one_each = np.arange(slots + 1, dtype=np.int32)
        ids, *others = self._device.split(lengths)
        self._ids = ids.view(torch.int64)
        self._offsets, self._starts, self._slots = (each.view(torch.int32) for each in others)
        self._graphs: dict[int, Callable[[], Outcome]] = {}
        record = record or _cuda_record()
        page_table[:, 0] = 0
        self.slots[:] = self._one_each[:-1]
        self.offsets[:] = self._one_each
        self._device.copy_(self._host)
        for size in reversed(self._sizes):  # the largest takes the memory that all others share
            self._graphs[size] = record(self._step(size))
        page_table[:, 0] = -1

    def run(self, n: int, tokens: int, greedy: bool) -> tuple[Tensor, Tensor | None] | None:
        """Runs a step of n rows with one token each.

        Returns the logits float32 [n, V] and, if `greedy`, the most likely tokens int32 [n], both valid until the next
        step; None if there is no graph for such a step.
        """
        if n != tokens or n > self._sizes[-1]:
            return None
        size = next(size for size in self._sizes if size >= n)
        shortest = self.starts[:n].argmin()
        for each in (self.ids, self.starts, self.slots):
            each[n:size] = each[shortest]
        self.offsets[: size + 1] = self._one_each[: size + 1]
        self._device.copy_(self._host, non_blocking=True)
        logits, drawn = self._graphs[size]()
        return logits[:n], drawn[:n] if greedy else None

    def _step(self, size: int) -> Callable[[], Outcome]:
        ids = self._ids[:size]
        most_likely = SamplingTensors.build([0.0] * size, device=ids.device)

        def step() -> Outcome:
            # A new one each time: what it derives from the rows is a part of the recording.
            meta = AttentionMeta(
                row_offsets=self._offsets[: size + 1],
                row_starts=self._starts[:size],
                row_slots=self._slots[:size],
                page_table=self._page_table,
                num_tokens=size,
                max_query=1,
                max_context=self._max_context,
            )
            logits = self._model.decode(ids, meta, self._cache)
            return logits, kernels.sample(logits, most_likely, ids, ids)

        return step


def _cuda_record() -> Record:
    pool: Any = torch.cuda.graph_pool_handle()
    return lambda function: kernels.CudaGraph(function, pool).replay
