"""GGUF files: metadata and an index of tensors over a memory map.

The format is llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian.
Arrays are decoded when they are asked for: a vocabulary of 49,000 strings costs a walk over their lengths, 15 ms.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.files import parts_of_file

Scalar = int | float | bool | str
MetadataValue = Scalar | list[int] | list[float] | list[bool] | list[str]

MAX_ENTRIES = 1 << 20
"""Metadata keys, and tensors, that a file may have."""
MAX_ARRAY = 1 << 26
"""Items that a metadata array may have."""
MAX_DIMENSIONS = 4

_UINT64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {number: struct.Struct("<" + code) for number, code in _SCALAR_CODES.items()}

BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml's tensor types: name, values in a block, bytes of a block."""


class TensorInfo(NamedTuple):
    """Where a tensor lies: ggml's type name, the shape with the fastest dimension last, its bytes in the file; of a
    model that is split into several, in which of them."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block_values: int
    block_bytes: int
    part: int = 0


class _LazyArray(NamedTuple):
    kind: int
    length: int
    offset: int


class Metadata(Mapping[str, MetadataValue]):
    """The file's metadata; arrays are decoded at each access."""

    def __init__(self, path: Path, buffer: memoryview, values: dict[str, Scalar | _LazyArray]) -> None:
        self._path = path
        self._buffer = buffer
        self._values = values

    def __getitem__(self, key: str) -> MetadataValue:
        value = self._values[key]
        return self._decode(key, value) if isinstance(value, _LazyArray) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def scalars(self) -> dict[str, Scalar]:
        """All values that are no arrays."""
        return {key: value for key, value in self._values.items() if not isinstance(value, _LazyArray)}

    def _decode(self, key: str, array: _LazyArray) -> MetadataValue:
        if array.kind != _STRING:
            scalar = _SCALARS[array.kind]
            end = array.offset + array.length * scalar.size
            return self._buffer[array.offset : end].cast(scalar.format[1:]).tolist()  # type: ignore[call-overload, no-any-return]
        data, at, unpack, strings = self._buffer, array.offset, _UINT64.unpack_from, []
        try:
            for _ in range(array.length):
                start = at + 8
                at = start + unpack(data, at)[0]
                strings.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path}: metadata {key!r} holds text that is not UTF-8") from None
        return strings


class GGUFFile:
    """A GGUF file, mapped. Nothing is read but what is asked for. The first file of a split model stands for all parts.

    Args:
        path: the file. part: 0 for the first, or only, file of a model, which brings the others with it.

    Attributes:
        metadata: by key, such as "general.architecture".
        tensors: by name, such as "blk.0.attn_q.weight".

    Raises:
        CheckpointError: the file cannot be read, is cut short or is not a GGUF file.
    """

    def __init__(self, path: Path, part: int = 0) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValueError:
            raise CheckpointError(f"{path}: is empty") from None
        self.buffer = memoryview(self._map)
        if self._map[:4] != b"GGUF":
            raise CheckpointError(f"{path}: is not a GGUF file, for it does not start with 'GGUF'")
        try:
            self._read_header()
        except (struct.error, OverflowError, IndexError):
            raise CheckpointError(f"{path}: is cut short in its header; download it again") from None
        self._buffers = [self.buffer]
        if not part:
            self._add_parts()

    def _add_parts(self) -> None:
        """The tensors of the other files of a model that llama.cpp's gguf-split has cut in pieces."""
        number, count = (self.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
        paths = parts_of_file(self.path)
        if not count:
            return
        if number or count != len(paths):
            raise CheckpointError(
                f"{self.path}: is one of {count} files of a model; give the first, NAME-00001-of-{count:05}.gguf, with "
                "the others beside it under their own names"
            )
        for part, path in enumerate(paths[1:], 1):
            file = GGUFFile(path, part)
            if file.metadata.get("split.no") != part:
                raise CheckpointError(f"{path}: is not part {part + 1} of {self.path.name}; download it again")
            doubles = file.tensors.keys() & self.tensors.keys()
            if doubles:
                raise CheckpointError(f"{path}: has a tensor {min(doubles)!r} that another part has as well")
            self.tensors |= {name: info._replace(part=part) for name, info in file.tensors.items()}
            self._buffers.append(file.buffer)

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor. Raises CheckpointError if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        return self._buffers[info.part][info.offset : info.offset + info.nbytes]

    def _read_header(self) -> None:
        version, tensor_count, metadata_count = struct.unpack_from("<IQQ", self.buffer, 4)
        if version not in (2, 3):
            order = "big-endian" if version & 0xFFFF == 0 and version else f"of version {version}"
            raise CheckpointError(f"{self.path}: is {order}; little-endian GGUF of version 2 or 3 is supported")
        for what, count in (("tensors", tensor_count), ("metadata keys", metadata_count)):
            if count > MAX_ENTRIES:
                raise CheckpointError(f"{self.path}: claims {count} {what}; the file is corrupt")
        at = 24
        values: dict[str, Scalar | _LazyArray] = {}
        for _ in range(metadata_count):
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", self.buffer, at)
            values[key], at = self._value(key, kind, at + 4)
        self.metadata = Metadata(self.path, self.buffer, values)
        entries: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensor_count):
            name, at = self._string(at)
            (dimensions,) = struct.unpack_from("<I", self.buffer, at)
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise CheckpointError(f"{self.path}: tensor {name!r} has {dimensions} dimensions; the file is corrupt")
            shape = struct.unpack_from(f"<{dimensions}Q", self.buffer, at + 4)
            kind, offset = struct.unpack_from("<IQ", self.buffer, at + 4 + 8 * dimensions)
            at += 16 + 8 * dimensions
            entries.append((name, shape[::-1], kind, offset))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise CheckpointError(f"{self.path}: an alignment of {alignment!r} makes no sense; the file is corrupt")
        base = -(-at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: has two tensors named {name!r}; the file is corrupt")
            self.tensors[name] = self._tensor(name, shape, kind, base + offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        block = BLOCKS.get(kind)
        if block is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is of ggml type {kind}, which is not known")
        type_name, values, nbytes = block
        if 0 in shape or shape[-1] % values:
            raise CheckpointError(f"{self.path}: tensor {name!r} of type {type_name} cannot have the shape {shape}")
        size = math.prod(shape) // values * nbytes
        if offset + size > len(self.buffer):
            raise CheckpointError(
                f"{self.path}: is cut short, tensor {name!r} ends at byte {offset + size} and the file at "
                f"{len(self.buffer)}; download it again"
            )
        return TensorInfo(type_name, shape, offset, size, values, nbytes)

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = _UINT64.unpack_from(self.buffer, at)
        end = at + 8 + length
        if end > len(self.buffer):
            raise CheckpointError(f"{self.path}: is cut short in its header; download it again")
        try:
            return str(self.buffer[at + 8 : end], "utf-8"), end
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: holds a name that is not UTF-8; the file is corrupt") from None

    def _value(self, key: str, kind: int, at: int) -> tuple[Scalar | _LazyArray, int]:
        if kind == _STRING:
            return self._string(at)
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            return scalar.unpack_from(self.buffer, at)[0], at + scalar.size
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: metadata {key!r} is of type {kind}, which is not known")
        item_kind, count = struct.unpack_from("<IQ", self.buffer, at)
        at += 12
        if count > MAX_ARRAY:
            raise CheckpointError(f"{self.path}: metadata {key!r} claims {count} items; the file is corrupt")
        array = _LazyArray(item_kind, count, at)
        if item_kind == _STRING:
            unpack, data = _UINT64.unpack_from, self.buffer
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        elif item_kind in _SCALARS:
            at += count * _SCALARS[item_kind].size
        else:
            raise CheckpointError(f"{self.path}: metadata {key!r} is an array of unsupported type {item_kind}")
        if at > len(self.buffer):
            raise CheckpointError(f"{self.path}: is cut short in its header; download it again")
        return array, at
