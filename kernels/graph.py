"""Kernel graphs for the CPU: the kernels that a piece of Python calls, recorded once and repeated by a single call.

What CUDA graphs are on a GPU. A decode step of a small model is hundreds of kernels of some microseconds each, and
Python, memory allocation and sleeping threads cost more than many of them. A repetition runs the recorded kernels
on the recorded addresses in C++, with the threads awake throughout, and gives the same bits as the Python would.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_runtime.kernels.cpu import functions, library
from llm_runtime.kernels.cpu.load import FUNCTIONS

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
        recording = _record(function, memory)
        self.result = recording.result
        self._keep = memory, recording.foreign  # what the kernels write and read, and nobody else may hold
        self._calls = _Calls(recording.calls)
        self.names = [call.name for call in recording.calls]
        """The kernels, in the order in which they run."""

    def replay(self) -> R:
        """Runs the kernels again: `result`, with new content.

        Raises MemoryError and IndexError as the kernels do.
        """
        self._calls.run()
        return self.result

    def timed(self) -> list[float]:
        """As `replay`; returns the seconds that each kernel took."""
        times = np.empty(len(self.names) + 1, np.int64)
        self._calls.run(times.ctypes.data)
        seconds: list[float] = (np.diff(times) / 1e9).tolist()
        return seconds


class SizedGraph(Generic[R]):
    """A graph for steps of many sizes: what of the kernels' arguments is a multiple of which size is found out by
    recording two, and filled in at each repetition.

    Args:
        function: given sizes, does with them what the function of a StepGraph may. It must not look at what kernels
            write: none is run here. A first dimension of one of the sizes may grow with it.
        memory: as for a StepGraph.
        most: the largest sizes.
        less: of each size another, smaller one; the same if it never changes.

    Raises:
        NotRecordable: as StepGraph, or an argument depends on the sizes in another way.
    """

    def __init__(
        self,
        function: Callable[[tuple[int, ...]], R],
        memory: GraphMemory,
        most: tuple[int, ...],
        less: tuple[int, ...],
    ) -> None:
        grown = {small: large for small, large in zip(less, most, strict=True) if small != large}
        # Once more than needed: then all finds the same blocks.
        for sizes in (most, less):
            _record(partial(function, sizes), memory, grown, run=False)
        small = _record(partial(function, less), memory, grown, run=False)
        large = _record(partial(function, most), memory, grown, run=False)
        self.result = large.result
        self._keep = memory, large.foreign, small.foreign
        self._calls = _Calls(large.calls)
        words, other = self._calls.words, _Calls(small.calls).words
        if [call.address for call in small.calls] != [call.address for call in large.calls]:
            raise NotRecordable("steps of other sizes call other kernels")
        changed = np.flatnonzero(words != other)
        self._multiples: list[tuple[NDArray[np.intp], NDArray[np.int64]]] = []
        left = np.ones(len(changed), np.bool_)
        for size, smaller in zip(most, less, strict=True):
            times = words[changed] // size
            mine = left & (times > 0) & (times * size == words[changed]) & (times * smaller == other[changed])
            self._multiples.append((changed[mine], times[mine]))
            left &= ~mine
        if left.any():
            raise NotRecordable("an argument of a kernel is no multiple of a size")

    def replay(self, sizes: tuple[int, ...]) -> R:
        """Runs the kernels for these sizes, at most the largest ones: `result`, of which the first lines are filled.

        Raises MemoryError and IndexError as the kernels do.
        """
        words = self._calls.words
        for size, (places, times) in zip(sizes, self._multiples, strict=True):
            words[places] = times * size
        self._calls.run()
        return self.result


class _Calls:
    """Calls of C++ functions, laid out in memory for `functions.graph`.

    Attributes:
        words: the arguments, which may be changed.
    """

    def __init__(self, calls: Sequence[_Call]) -> None:
        native = library()
        assert native is not None
        self._library = native
        places = np.cumsum([0, *(len(call.argument) + -len(call.argument) % _ALIGNMENT for call in calls)])
        memory = np.zeros(places[-1] + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        arguments = memory[start : start + places[-1]]
        for call, place in zip(calls, places.tolist(), strict=False):
            arguments[place : place + len(call.argument)] = np.frombuffer(call.argument, np.uint8)
        self.words = arguments.view(np.int64)
        self._operations = np.empty((len(calls), 2), np.uint64)
        self._operations[:, 0] = [call.address for call in calls]
        self._operations[:, 1] = places[:-1] + arguments.ctypes.data
        self._address = self._operations.ctypes.data

    def run(self, times: int = 0) -> None:
        """times: address of int64 [calls + 1] for when each began, and the last ended; 0 for none."""
        functions.graph(self._library, self._address, len(self._operations), times)


@dataclass(frozen=True)
class _Recording(Generic[R]):
    result: R
    calls: list[_Call]
    foreign: dict[int, Tensor]


def _record(
    function: Callable[[], R], memory: GraphMemory, grown: dict[int, int] | None = None, run: bool = True
) -> _Recording[R]:
    """Notes the kernels that a function calls, and runs them unless told not to. grown: sizes of first dimensions that
    take as much memory as others."""
    native = library()
    if native is None:
        raise NotRecordable("there are no C++ kernels")
    calls: list[_Call] = []
    recorder = _Recorder(memory, grown or {})
    with recorder, _recorded(native, calls, run):
        result = function()
    return _Recording(result, calls, recorder.foreign)


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

    def __init__(self, memory: GraphMemory, grown: dict[int, int]) -> None:
        super().__init__()
        self._grown = grown
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
        most = nbytes // shape[0] * self._grown.get(shape[0], shape[0]) if nbytes else 0
        size = max(_ALIGNMENT, 1 << (most - 1).bit_length()) if nbytes else _ALIGNMENT
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._memory.grow(size)
        held = block[:nbytes]  # an array of its own, which lives as long as the tensor's storage
        weakref.finalize(held, free.append, block)
        self._own.add(held.ctypes.data)
        return torch.from_numpy(held).view(dtype).view(shape)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


@contextmanager
def _recorded(native: ctypes.CDLL, calls: list[_Call], run: bool) -> Iterator[None]:
    """Notes every call of a C++ function, whoever makes it; without `run` they only seem to succeed."""

    def noted(name: str, function: Any) -> Callable[[bytes], int]:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None

        def call(argument: bytes) -> int:
            result: int = function(argument) if run else 0
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
