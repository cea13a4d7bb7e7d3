"""The files that a checkpoint's weights are in."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.json_file import read_json

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONSOLIDATED = "consolidated"
"""Begins the names of files with Mistral's own names of tensors, which stand beside others with the same content."""
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)")
_MAX_HEADER = 2**27


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file; `dtype` is that format's name of its type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weight_files(path: Path) -> list[Path]:
    """All files with weights, whether they are there or not: of a GGUF file its parts, of a directory the safetensors
    files that transformers would read. A whole file goes before an index; where there is neither, or an index of files
    none of which is there, all files count.

    Raises CheckpointError for an index that is none.
    """
    if not path.is_dir():
        return parts_of_file(path)
    whole, index = path / WHOLE, path / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = sorted(set(read_json(index, _Index).weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{path}: the index names {name!r}, which is not a file beside it")
        if any((path / name).is_file() for name in names) or not any(path.glob("*.safetensors")):
            return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(_CONSOLIDATED)] or files
    return sorted({part for file in files for part in parts_of_file(file)})


def missing_file(path: Path) -> str:
    """Name of a file that the checkpoint lacks; empty if it lacks none. Raises CheckpointError as `weight_files`."""
    files = weight_files(path)
    if not files:
        return "a *.safetensors file"
    return next((file.name for file in files if not file.is_file()), "")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory by name, from the headers of its files. Raises CheckpointError."""
    missing = missing_file(path)
    if missing:
        raise CheckpointError(f"{path}: {missing} is missing; download the model again")
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        for name, entry in _header(file).items():
            tensors[name] = StoredTensor(file, entry.dtype, tuple(entry.shape))
    return tensors


def parts_of_file(file: Path) -> list[Path]:
    """The files that a file is a part of: those of a split model are called NAME-00001-of-00003, and so on."""
    found = _PART.fullmatch(file.name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return [file]
    count = int(found[3])
    return [file.with_name(f"{found[1]}-{number:05}-of-{count:05}{found[4]}") for number in range(1, count + 1)]


def _header(file: Path) -> dict[str, _Entry]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = msgspec.json.decode(stream.read(min(length, _MAX_HEADER)), type=dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        return {name: msgspec.convert(entry, _Entry) for name, entry in header.items()}
    except (OSError, struct.error, msgspec.MsgspecError, UnicodeDecodeError):
        raise CheckpointError(f"{file}: is no safetensors file, or cut short; download it again") from None
