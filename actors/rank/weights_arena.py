"""What stands in front of the weights in an arena, and how an arena comes to be filled, sealed and mapped."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.actors.checkpoint.files import weight_files
from llm_runtime.actors.dtypes import WeightDType
from llm_runtime.actors.rank.shard import HEADER_BYTES
from llm_runtime.transport import Arena

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 4
_MAGIC = b"weights\0"
_HEADER = struct.Struct("<8sQI")  # magic, state, bytes of the contents' description that follows
_EMPTY, _PACKING, _READY = 0, 1, 2


class Identity(msgspec.Struct, frozen=True):
    """What the weights in an arena are. All but the file's state must be what a rank expects."""

    version: int
    path: str
    dtype: str
    tp: int
    rank: int
    packed: bool
    files: list[tuple[str, int, int]]
    """Name, bytes and time of change (ns) of each of the checkpoint's files."""


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies that no layout tells the place of; `dtype` is torch's name of its type."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


class Contents(msgspec.Struct, frozen=True):
    """What stands in front of the weights in an arena, so that a restarted rank need not open the checkpoint.

    `checkpoint` is `checkpoint_identity` of the files that the weights were read from; `tensors` are those of a model
    that is not implemented here.
    """

    identity: Identity
    config: ModelConfig
    checkpoint: str
    tensors: list[StoredTensor] = []


def _state(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except FileNotFoundError:  # has been removed since the weights were packed, or the source will say so
        return file.name, 0, 0
    return file.name, stat.st_size, stat.st_mtime_ns


def contents_of(descriptor: int) -> Contents | None:
    """What an arena holds; None if it is empty or its packing was not finished.

    Raises StartFailure if it is sealed and holds nothing that can be used.
    """
    header = os.pread(descriptor, HEADER_BYTES, 0)
    magic, state, length = _HEADER.unpack_from(header) if len(header) >= _HEADER.size else (b"", _EMPTY, 0)
    if magic == _MAGIC and state == _READY:
        try:
            return msgspec.json.decode(header[_HEADER.size : _HEADER.size + length], type=Contents)
        except msgspec.MsgspecError:
            pass
    if Arena(descriptor, private=True).sealed:
        raise StartFailure("the weights arena is sealed but holds no weights: restart the engine")
    return None


def identity_of(path: Path, dtype: WeightDType, tp: int, rank: int, packed: bool) -> Identity:
    """What the weights will be that are read from `path`."""
    return Identity(LAYOUT_VERSION, str(path), dtype, tp, rank, packed, [_state(file) for file in weight_files(path)])


def check_room(descriptor: int, size: int) -> None:
    """Raises StartFailure if an arena has less than `size` bytes."""
    arena_bytes = os.fstat(descriptor).st_size
    if arena_bytes < size:
        raise StartFailure(f"the weights arena has {arena_bytes} bytes and {size} are needed: restart the engine")


def sealed_arena(descriptor: int) -> Arena:
    """An arena whose weights are whole, sealed and mapped for reading."""
    arena = Arena(descriptor, private=True)
    if not arena.sealed:
        arena.seal()
    return arena


def compare_identities(found: Identity, wanted: Identity) -> None:
    if msgspec.structs.replace(found, files=wanted.files) != wanted:
        raise StartFailure(f"the weights arena holds {found}, not {wanted}: restart the engine")
    if found.files != wanted.files:
        logger.warning("the checkpoint's files have changed; going on with the weights that this engine started with")


@contextmanager
def packing(descriptor: int, contents: Contents) -> Iterator[Arena]:
    """An arena to be filled with what `contents` says. Marked as not finished until the block has come to its end."""
    started = time.perf_counter()
    arena = Arena(descriptor)
    if _HEADER.unpack_from(arena.buffer)[:2] == (_MAGIC, _PACKING):
        logger.warning("a former incarnation was killed while it packed the weights; packing them again")
    encoded = msgspec.json.encode(contents)
    if _HEADER.size + len(encoded) > HEADER_BYTES:
        raise StartFailure(f"{contents.identity.path}: its description does not fit into {HEADER_BYTES} bytes")
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _PACKING, len(encoded))
    arena.buffer[_HEADER.size : _HEADER.size + len(encoded)] = encoded
    yield arena
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _READY, len(encoded))
    arena.close()
    logger.info("packed the weights in %.2f s", time.perf_counter() - started)
