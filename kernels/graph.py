"""Kernel graphs for the CPU: the kernels that a piece of Python calls, recorded once and repeated by a single call.

What CUDA graphs are on a GPU. A decode step of a small model is hundreds of kernels of some microseconds each, and
Python, memory allocation and sleeping threads cost more than many of them. A repetition runs the recorded kernels
on the recorded addresses in C++, with the threads awake throughout, and gives the same bits as the Python would.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.cpu import functions, library
from kernels.cpu.load import FUNCTIONS

R = TypeVar("R")

_ALIGNMENT = 64
_EMPTY_LIKE = torch.ops.aten.empty_like.default
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, _EMPTY_LIKE}


class NotRecordable(Exception):
    """The code does more than call kernels, so repeating its kernels would not repeat it. The message says what."""


class GraphMemory:
    """Memory for the intermediate results of graphs, which share it: only one of them runs at a time.

    Blocks have powers of two as sizes, so that graphs of many shapes take little more than the largest of them.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, list[NDArray[np.uint8]]] = {}

    @property
    def nbytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._blocks.items())

    def blocks(self) -> dict[int, list[NDArray[np.uint8]]]:
        """All blocks by size, as one graph's free list."""
        return {size: list(blocks) for size, blocks in self._blocks.items()}

    def grow(self, size: int) -> NDArray[np.uint8]:
        """A new block."""
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        at = -memory.ctypes.data % _ALIGNMENT
        block = memory[at : at + size]
        self._blocks.setdefault(size, []).append(block)
        return block


class StepGraph(Generic[R]):
    """Runs `function`, records the kernels that it calls, and repeats them.

    The function may create empty tensors, take views and call CPU kernels. What it reads must be in tensors that the
    caller keeps, and changes between repetitions by being written there. A torch operation that computes would be
    missing from a repetition, so it is refused; numbers that Python computes from contents stay what they were.

    Args:
        function: what is recorded. It is run once, here, and its result is `result`.
        memory: where its tensors are put. Running another graph with the same memory overwrites them, `result` too.

    Raises:
        NotRecordable: the function does something else than call kernels, or there are no C++ kernels.
    """

    def __init__(self, function: Callable[[], R], memory: GraphMemory) -> None:
        native = library()
        if native is None:
            raise NotRecordable("there are no C++ kernels")
        calls: list[_Call] = []
        recorder = _Recorder(memory)
        with recorder, _recorded(native, calls):
            self.result = function()
        self._library = native
        self._keep = memory, recorder.foreign  # what the kernels write and read, and nobody else may hold
        places = np.cumsum([0, *(len(call.argument) + -len(call.argument) % _ALIGNMENT for call in calls)])
        self._arguments = np.zeros(places[-1] + _ALIGNMENT, np.uint8)
        start = -self._arguments.ctypes.data % _ALIGNMENT
        for call, place in zip(calls, (places + start).tolist(), strict=False):
            self._arguments[place : place + len(call.argument)] = np.frombuffer(call.argument, np.uint8)
        self._operations = np.empty((len(calls), 2), np.uint64)
        self._operations[:, 0] = [call.address for call in calls]
        self._operations[:, 1] = places[:-1] + (self._arguments.ctypes.data + start)
        self._address = self._operations.ctypes.data
        self.names = [call.name for call in calls]
        """The kernels, in the order in which they run."""

    def replay(self) -> R:
        """Runs the kernels again: `result`, with new content.

        Raises MemoryError and IndexError as the kernels do.
        """
        functions.graph(self._library, self._address, len(self.names), 0)
        return self.result

    def timed(self) -> list[float]:
        """As `replay`; returns the seconds that each kernel took."""
        times = np.empty(len(self.names) + 1, np.int64)
        functions.graph(self._library, self._address, len(self.names), times.ctypes.data)
        seconds: list[float] = (np.diff(times) / 1e9).tolist()
        return seconds


@dataclass(frozen=True)
class _Call:
    """One call of a C++ function."""

    name: str
    address: int
    argument: bytes


class _Recorder(TorchDispatchMode):
    """Puts empty tensors into the graph's memory, lets views pass, and refuses all that computes.

    A tensor's block is free again when its storage is, just as at a repetition, which comes by in the same order.
    """

    def __init__(self, memory: GraphMemory) -> None:
        super().__init__()
        self.foreign: dict[int, Tensor] = {}
        self._memory = memory
        self._free = memory.blocks()
        self._own: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """True, torch's default, would import its compiler here: two seconds, and a hundred megabytes."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY:
            like = args[0] if isinstance(args[0], Tensor) else None
            shape = list(like.shape) if like is not None and len(args) == 1 else list(args[-1])
            dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
            device = kwargs.get("device") or ("cpu" if like is None else like.device)
            strided = func is _EMPTY_LIKE and not args[0].is_contiguous()
            if strided or torch.device(device).type != "cpu":
                raise NotRecordable(f"{func} makes a tensor that is not contiguous on the CPU")
            return self._take(shape, dtype)
        if func._schema.is_mutable or func is torch.ops.aten.lift_fresh.default:
            raise NotRecordable(f"{func} is no kernel")
        result = func(*args, **kwargs)
        given = {each.untyped_storage().data_ptr(): each for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        made = [each.untyped_storage().data_ptr() for each in tree_leaves(result) if _is_tensor(each)]
        if not made or not given.keys() >= set(made):
            raise NotRecordable(f"{func} is no kernel")
        self.foreign |= {pointer: each for pointer, each in given.items() if pointer not in self._own}
        return result

    def _take(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        size = max(_ALIGNMENT, 1 << (nbytes - 1).bit_length()) if nbytes else _ALIGNMENT
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._memory.grow(size)
        held = block[:nbytes]  # an array of its own, which lives as long as the tensor's storage
        weakref.finalize(held, free.append, block)
        self._own.add(held.ctypes.data)
        return torch.from_numpy(held).view(dtype).view(shape)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


@contextmanager
def _recorded(native: ctypes.CDLL, calls: list[_Call]) -> Iterator[None]:
    """Notes every call of a C++ function, whoever makes it."""

    def noted(name: str, function: Any) -> Callable[[bytes], int]:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None

        def call(argument: bytes) -> int:
            result: int = function(argument)
            if result == 0:
                calls.append(_Call(name, address, argument))
            return result

        return call

    functions = {name: getattr(native, name) for name in FUNCTIONS}
    try:
        for name, function in functions.items():
            setattr(native, name, noted(name, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(native, name, function)
