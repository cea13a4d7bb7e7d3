"""Which of its ways a quantized linear layer takes, by the number of rows: a table measured on this machine.

Products of vectors are best for few rows, and for any number where the processor has no matrix registers (AMX): there
all rows go one way, and nothing is measured. With them, matrix instructions are best for many rows. From how many on
depends on the processor, its memory, the threads and the shape. `tune` measures it once and stores it beside the
compiled library, under the names of library and processor, so that later processes, and a restarted one among them,
choose the same. Shapes that were never measured take DEFAULT_ROWS.
"""

import ctypes
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_runtime.kernels.cpu.compile import EXTENSIONS, processor_flags
from llm_runtime.kernels.cpu.functions import linear_quantized
from llm_runtime.kernels.cpu.load import library
from llm_runtime.kernels.packing import packed_bytes
from llm_runtime.kernels.types import PackedWeight

VECTORS, BYTE_TILES, BFLOAT16_TILES, PAIRS = 0, 1, 2, 3
# The ways that each kind has. The first two give the same bits. A library without instructions for tiles takes vectors
# for them, in int4 PAIRS for BFLOAT16_TILES, and VECTORS for PAIRS without those that multiply pairs of bfloat16.
WAYS = {
    "int8": (VECTORS, BYTE_TILES, BFLOAT16_TILES),
    "int4": (VECTORS, BYTE_TILES, BFLOAT16_TILES, PAIRS),
}
# Without `deterministic`, few rows take these, and all rows without matrix registers.
FEW = {"int8": VECTORS, "int4": PAIRS}
# Rows from which on BYTE_TILES are taken with `deterministic`, and without it, and BFLOAT16_TILES instead, if nothing
# was measured.
DEFAULT_ROWS = (12, 12, 32)
# Numbers of rows that are compared; NEVER if the last is not enough.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
NEVER = 1 << 30
PART_OUTPUTS = 4096  # measured of an output layer
REPEATS = 7

Table = dict[str, list[int]]


def way(weight: PackedWeight, rows: int, deterministic: bool) -> int:
    """The way of a layer, one of WAYS. With `deterministic`, among those that give the same bits."""
    few, byte_tiles, many, way_of_many = limits(weight.kind, weight.out_features, weight.in_features, deterministic)
    return way_of_many if rows >= many else BYTE_TILES if rows >= byte_tiles else few


def limits(kind: str, outputs: int, inputs: int, deterministic: bool) -> tuple[int, int, int, int]:
    """The way of a layer for few rows, the rows from which on it takes BYTE_TILES, those from which on it takes a third
    way, and that way."""
    few = VECTORS if deterministic else FEW[kind]
    if not _has_tiles():
        return few, NEVER, NEVER, few
    exact, some, many = _table().get(_key(kind, outputs, inputs), DEFAULT_ROWS)
    return (few, exact, NEVER, few) if deterministic else (few, some, many, BFLOAT16_TILES)


def tune(weights: Sequence[PackedWeight]) -> Table:
    """Measures the shapes among these weights that the table does not have yet, with the present number of threads.

    Give all layers of a model, so that they come from memory as they do in use; other weights than int8 and int4 are
    passed over. Takes a few tenths of a second, and nothing if the table has them; processes that ask at the same
    time measure once. Returns the table: rows as in DEFAULT_ROWS, by "kind outputs inputs threads". Without matrix
    registers, the C++ library, or a place to store it, it stays as it is.
    """
    native = library()
    path = _path()
    if native is None or path is None or not _has_tiles():
        return dict(_table())
    shapes: dict[str, list[PackedWeight]] = {}
    for weight in weights:
        if weight.kind in WAYS and weight.panels.is_cpu:
            shapes.setdefault(_key(weight.kind, weight.out_features, weight.in_features), []).append(weight)
    if shapes.keys() <= _table().keys():
        return dict(_table())
    try:
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = _read(path)
            for key, same in shapes.items():
                if key not in table:
                    table[key] = _measure(native, same)
                    _write(path, table)
    except OSError:
        pass
    _table.cache_clear()
    return dict(_table())


def _key(kind: str, outputs: int, inputs: int) -> str:
    return f"{kind} {outputs} {inputs} {torch.get_num_threads()}"


@cache
def _has_tiles() -> bool:
    return processor_flags().issuperset(EXTENSIONS[-1])


@cache
def _table() -> Table:
    path = _path()
    return {} if path is None else _read(path)


def _path() -> Path | None:
    """Where the table lies; None without the library."""
    native = library()
    if native is None:
        return None
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    wanted = ("model name", "flags", "cache size", "processor")
    lines = sorted(line for line in processor.splitlines() if line.startswith(wanted))
    name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    built = Path(native._name)
    return built.with_name(f"{built.stem}-{name}.paths.json")


def _read(path: Path) -> Table:
    """What was stored; nothing if that is missing or damaged."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: limits for key, limits in stored.items() if _is_entry(limits)}


def _is_entry(limits: object) -> bool:
    return (
        isinstance(limits, list)
        and len(limits) == len(DEFAULT_ROWS)
        and all(isinstance(rows, int) and rows > 0 for rows in limits)
    )


def _write(path: Path, table: Table) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="paths-", delete=False) as file:
        json.dump(table, file, indent=0, sort_keys=True)
    os.replace(file.name, path)


def _measure(native: ctypes.CDLL, weights: list[PackedWeight]) -> list[int]:
    """An entry of the table."""
    weights = [part for weight in weights for part in _parts(weight)]
    few = FEW[weights[0].kind]
    exact = _first_faster(native, weights, lambda _: VECTORS, BYTE_TILES)
    some = exact if few == VECTORS else _first_faster(native, weights, lambda _: few, BYTE_TILES)
    many = _first_faster(native, weights, lambda rows: BYTE_TILES if rows >= some else few, BFLOAT16_TILES)
    return [exact, some, many]


def _parts(weight: PackedWeight) -> Iterator[PackedWeight]:
    """The whole of a weight, or parts of PART_OUTPUTS: an output layer would take long, and tell no more."""
    if weight.out_features <= PART_OUTPUTS:
        yield weight
        return
    size = packed_bytes(weight.kind, PART_OUTPUTS, weight.in_features)
    for start in range(0, weight.out_features // PART_OUTPUTS * size, size):
        yield PackedWeight(weight.panels[start : start + size], weight.kind, PART_OUTPUTS, weight.in_features)


def _first_faster(native: ctypes.CDLL, weights: list[PackedWeight], usual: Callable[[int], int], other: int) -> int:
    """The least of ROWS for which `other` is faster than the usual way of as many rows, by bisection."""
    low, high = 0, len(ROWS)
    x = torch.randn(ROWS[-1], weights[0].in_features)
    while low < high:
        middle = (low + high) // 2
        rows = ROWS[middle]
        if _is_faster(native, x[:rows], weights, usual(rows), other):
            high = middle
        else:
            low = middle + 1
    return ROWS[low] if low < len(ROWS) else NEVER


def _is_faster(native: ctypes.CDLL, x: Tensor, weights: list[PackedWeight], usual: int, other: int) -> bool:
    """Whether `other` is faster than `usual` for these rows; the two take turns."""
    best = {usual: math.inf, other: math.inf}
    for turn in range(REPEATS):
        for i, candidate in enumerate(best):
            weight = weights[(2 * turn + i) % len(weights)]
            start = time.perf_counter()
            linear_quantized(native, x, weight, None, candidate)
            best[candidate] = min(best[candidate], time.perf_counter() - start)
    return best[other] < best[usual]
