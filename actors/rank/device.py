"""A CUDA device's memory: copies to it that nobody waits for, and what to do when it is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime.actors.actor import StartFailure

R = TypeVar("R")

PATIENCE_S = 20.0
"""How long a start waits for the memory of a former incarnation: the driver gives it back some time after its end."""


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device; on the CPU, the same memory. CUDA takes the content of such memory before the call ends,
    so that the array may change at once, and queued kernels are not waited for."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def in_device_memory(make: Callable[[], R], what: str, advice: str) -> R:
    """What `make` returns, tried again for a while when memory runs out.

    Raises StartFailure if that does not help; `what` and `advice` are parts of its sentence.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return make()
        except torch.OutOfMemoryError:
            if time.monotonic() > deadline:
                free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
                room = f"the device's memory, of which {free:.1f} of {total:.1f} GiB are free"
                raise StartFailure(f"{what} not fit into {room}: {advice}") from None
        torch.cuda.empty_cache()
        time.sleep(0.1)
