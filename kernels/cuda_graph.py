"""Kernel graphs of CUDA: a piece of Python whose kernels are recorded once and then launched by a single call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")


class CudaGraph(Generic[R]):
    """Runs `function`, records its kernels, and repeats them.

    The function must not ask the device for a value. What it reads must be in tensors that the caller keeps, and
    changes between repetitions by being written there; numbers that Python computes stay what they were.

    Args:
        function: what is recorded. It is run twice: once as it is, so that kernels are compiled, and once to record.
        pool: memory that graphs share, of `torch.cuda.graph_pool_handle()`. Running another one overwrites what is
            between the kernels of this one.
    """

    def __init__(self, function: Callable[[], R], pool: Any) -> None:
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            function()
        here.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.result = function()
        """What the function returned while it was recorded: overwritten by each repetition."""

    def replay(self) -> R:
        """Queues the kernels again, without waiting for them: `result`, with new content."""
        self._graph.replay()
        return self.result
