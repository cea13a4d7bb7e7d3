"""Which of its two ways a quantized linear layer takes, by the number of rows: a table measured on this machine.

Products of vectors of bytes are best for few rows, matrix instructions for many; from how many on depends on the
processor,
memory, threads and shape. `tune` measures it once and stores it beside the compiled library, under the names of library and
processor, so that later processes, and a restarted one among them, choose the same. Shapes that were never measured
take DEFAULT_ROWS.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.compile import EXTENSIONS, processor_flags
from kernels.cpu.functions import linear_quantized
from kernels.cpu.load import library
from kernels.types import PackedWeight

# Rows from which on matrix instructions are taken if nothing was measured.
DEFAULT_ROWS = {"int8": 4, "int4": 16}
# Numbers of rows that are compared; more than the last never take the other way.
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
REPEATS = 7


def use_matrix(kind: str, outputs: int, inputs: int, rows: int, deterministic: bool) -> bool:
    """Whether a layer takes matrix instructions. int8 has the same results either way; int4 has not."""
    if kind == "int4" and deterministic:
        return False
    return rows >= _table().get(_key(kind, outputs, inputs), DEFAULT_ROWS[kind])


def tune(weights: Sequence[PackedWeight]) -> dict[str, int]:
    """Measures the shapes among these weights that the table does not have yet, with the present number of threads.

    Give all layers of a model, so that they come from memory as they do in use; other weights than int8 and int4 are
    passed over. Takes a few tenths of a second, and nothing if the table has them; processes that ask at the same
    time measure once. Returns the table: rows from which on matrix instructions are taken, by
    "kind outputs inputs threads". Without the C++ library or matrix instructions, or a place to store it, it stays
    as it is.
    """
    native = library()
    path = _path()
    if native is None or path is None or not processor_flags().issuperset(EXTENSIONS[-1]):
        return dict(_table())
    shapes: dict[str, list[PackedWeight]] = {}
    for weight in weights:
        if weight.kind in DEFAULT_ROWS and weight.panels.is_cpu:
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
        return dict(_table())
    _table.cache_clear()
    return dict(_table())


def _key(kind: str, outputs: int, inputs: int) -> str:
    return f"{kind} {outputs} {inputs} {torch.get_num_threads()}"


@cache
def _table() -> dict[str, int]:
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


def _read(path: Path) -> dict[str, int]:
    """What was stored; nothing if that is missing or damaged."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: rows for key, rows in stored.items() if isinstance(rows, int) and rows > 0}


def _write(path: Path, table: dict[str, int]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="paths-", delete=False) as file:
        json.dump(table, file, indent=0, sort_keys=True)
    os.replace(file.name, path)


def _measure(native: ctypes.CDLL, weights: list[PackedWeight]) -> int:
    """The least number of ROWS for which matrix instructions are faster, by bisection."""
    low, high = 0, len(ROWS)
    x = torch.randn(ROWS[-1], weights[0].in_features)
    while low < high:
        middle = (low + high) // 2
        if _is_faster(native, x[: ROWS[middle]], weights):
            high = middle
        else:
            low = middle + 1
    return ROWS[low] if low < len(ROWS) else 1 << 30


def _is_faster(native: ctypes.CDLL, x: Tensor, weights: list[PackedWeight]) -> bool:
    """Whether matrix instructions are, for this number of rows; the two take turns."""
    best = {False: float("inf"), True: float("inf")}
    for turn in range(REPEATS):
        for matrix in best:
            weight = weights[(2 * turn + matrix) % len(weights)]
            start = time.perf_counter()
            linear_quantized(native, x, weight, None, matrix)
            best[matrix] = min(best[matrix], time.perf_counter() - start)
    return best[True] < best[False]
