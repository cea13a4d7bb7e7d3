"""Steps on CUDA devices: recorded graphs for a few sizes, and other steps filled up to the next of them.

What a step is filled up with stands in rows of nobody: their line of the page table names one page, over and over,
that is there to be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.rank.models import Model
from llm_runtime.actors.rank.sampler import Drawing
from llm_runtime.kernels import AttentionMeta, KVCache, SamplingTensors

R = TypeVar("R")
Replay = Callable[[], Any]
Record = Callable[[Replay], Replay]
"""Makes something that repeats a function's kernels, and returns what the function has returned, with new content."""

MOST_ROWS = 512
"""Larger decode steps keep a device busy without a graph."""
FEW_ROWS = 8
TOKENS = (16, 64, 128, 256, 384, 512)
"""Sizes of other steps. Launching the kernels of larger ones takes less time than running them."""


def cuda_record() -> Record:
    """CUDA graphs that share their memory: of all that a recorder has made, one at a time may run."""
    pool: Any = torch.cuda.graph_pool_handle()
    return lambda function: kernels.CudaGraph(function, pool).replay


def padded_rows(most: int) -> list[int]:
    """The numbers of rows for which decode steps are recorded: 1, 2, 4, 8, then steps of 8, and later of a quarter."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 32 * 8))
    return [size for size in sizes if size < most] + [most]


class _Inputs:
    """What a step reads, in one buffer on the host and one on the device: it is copied once.

    Attributes:
        ids: int64 [tokens]; offsets: int32 [rows + 1]; starts, slots: int32 [rows]. On the host.
    """

    def __init__(self, page_table: Tensor, max_context: int, rows: int, tokens: int) -> None:
        self._page_table = page_table
        self._max_context = max_context
        self.nobody = len(page_table) - 1
        device = page_table.device
        lengths = [8 * tokens, 4 * (rows + 1), 4 * rows, 4 * rows]
        self._host = torch.zeros(sum(lengths), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
        ids, *others = torch.split(self._host, lengths)
        self.ids: NDArray[np.int64] = ids.view(torch.int64).numpy()
        self.offsets, self.starts, self.slots = (each.view(torch.int32).numpy() for each in others)
        ids, *others = torch.split(self._device, lengths)
        self._ids = ids.view(torch.int64)
        self._offsets, self._starts, self._slots = (each.view(torch.int32) for each in others)
        self.slots[:] = self.nobody

    def send(self) -> None:
        self._device.copy_(self._host, non_blocking=True)

    def on_device(self, rows: int, tokens: int, max_query: int) -> tuple[Tensor, AttentionMeta]:
        """Ids and rows of a step, as a model takes them."""
        return self._ids[:tokens], AttentionMeta(
            row_offsets=self._offsets[: rows + 1],
            row_starts=self._starts[:rows],
            row_slots=self._slots[:rows],
            page_table=self._page_table,
            num_tokens=tokens,
            max_query=max_query,
            max_context=self._max_context,
        )


class PaddedDecode:
    """Decode steps: one new token a row. They are recorded when this is made.

    Args:
        page_table: int32 [slots + 1, max_pages], whose content may change between steps; the last line is nobody's.
        max_context: most positions that a row ever has.
        record: see `Record`.

    Attributes:
        ids: int64 [slots]; offsets: int32 [slots + 1]; starts, slots: int32 [slots]. What the next step reads, its own
            at the beginning of each, as in `DecodeGraphs`.
    """

    def __init__(self, model: Model, cache: KVCache, page_table: Tensor, max_context: int, record: Record) -> None:
        self._model = model
        self._cache = cache
        slots = len(page_table) - 1
        self._sizes = padded_rows(min(slots, MOST_ROWS))
        self._inputs = inputs = _Inputs(page_table, max_context, slots, slots)
        self.ids, self.offsets, self.starts, self.slots = inputs.ids, inputs.offsets, inputs.starts, inputs.slots
        self._one_each = np.arange(slots + 1, dtype=np.int32)
        self.offsets[:] = self._one_each
        inputs.send()
        # The largest first: it takes the memory that all others share.
        self._graphs = {size: record(self._step(size)) for size in reversed(self._sizes)}

    def run(self, n: int, tokens: int, drawing: Drawing | None) -> tuple[Tensor, Tensor | None] | None:
        """Runs a step of n rows with one token each.

        drawing: how each row draws its token, if all draw it from the logits as they are.

        Returns the logits float32 [n, V] and, if all take the most likely tokens, these, int32 [n], both valid until
        the next step; None if there is no graph for such a step.
        """
        if n != tokens or n > self._sizes[-1]:
            return None
        size = next(size for size in self._sizes if size >= n)
        self.ids[n:size] = self.starts[n:size] = 0
        self.slots[n:size] = self._inputs.nobody
        self.offsets[: size + 1] = self._one_each[: size + 1]
        self._inputs.send()
        logits, drawn = self._graphs[size]()
        greedy = drawing is not None and drawing.params.all_greedy
        return logits[:n], drawn[:n] if greedy else None

    def _step(self, size: int) -> Replay:
        most_likely = SamplingTensors.build([0.0] * size, device=self._cache.device)

        def step() -> tuple[Tensor, Tensor]:
            ids, meta = self._inputs.on_device(size, size, 1)
            logits = self._model.decode(ids, meta, self._cache)
            return logits, kernels.sample(logits, most_likely, ids, ids)

        return step


class PaddedSteps:
    """Small steps of any kind, up to the states from which logits are computed. They are recorded when this is made.

    Args: as for `PaddedDecode`.
        sizes: numbers of new tokens, ascending; none above `max_context`.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        page_table: Tensor,
        max_context: int,
        record: Record,
        sizes: Sequence[int] = TOKENS,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sizes = [size for size in sizes if size <= max_context]
        # One row more than may be asked for, which has the tokens that are nobody's.
        self._rows = sorted({min(FEW_ROWS, len(page_table)), len(page_table)})
        tokens = max(self._sizes, default=0)
        self._inputs = _Inputs(page_table, max_context, self._rows[-1], tokens)
        self._graphs: dict[tuple[int, int], Replay] = {}
        for size, rows in product(reversed(self._sizes), self._rows):
            self._inputs.offsets[:] = size
            self._inputs.offsets[0] = 0
            self._inputs.send()
            self._graphs[size, rows] = record(self._step(size, rows))

    def run(
        self, ids: NDArray[np.int64], offsets: NDArray[np.int32], starts: NDArray[np.int32], slots: NDArray[np.int32]
    ) -> Tensor | None:
        """The states of a step's new tokens [T, H], valid until the next step; None if there is no graph for it.

        ids: [T]; offsets: [n + 1]; starts, slots: [n], as in `AttentionMeta`.
        """
        tokens, n = len(ids), len(slots)
        size = next((size for size in self._sizes if size >= tokens), None)
        rows = next((rows for rows in self._rows if rows > n), None)
        if size is None or rows is None or tokens == 0:
            return None
        inputs = self._inputs
        inputs.ids[:tokens], inputs.ids[tokens:size] = ids, 0
        inputs.offsets[: n + 1], inputs.offsets[n + 1 : rows + 1] = offsets, size
        inputs.starts[:n], inputs.starts[n:rows] = starts, 0
        inputs.slots[:n], inputs.slots[n:rows] = slots, inputs.nobody
        inputs.send()
        states: Tensor = self._graphs[size, rows]()
        return states[:tokens]

    def _step(self, size: int, rows: int) -> Replay:
        def step() -> Tensor:
            ids, meta = self._inputs.on_device(rows, size, size)
            return self._model.hidden(ids, meta, self._cache)

        return step
