"""What a checkpoint's files say about themselves, for people and for clients that list models."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.gguf import GGUFFile

_MAX_HEADER = 100 * 2**20
"""Bytes of a safetensors file's header; the library's own limit."""
_HASHED = 2**16
_LONGEST_TEXT = 256
_FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S"},
    **{12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"},
}
"""llama.cpp's names of mixtures of types, by `general.file_type`."""
_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "vocab_size": "vocab_size",
}
"""Keys of config.json, and what GGUF files call them behind the architecture's name."""


class CheckpointFacts(msgspec.Struct, frozen=True):
    """What is known without looking at weights; empty where files do not say.

    Attributes:
        format: gguf or safetensors.
        architecture: llama.cpp's name, or config.json's `model_type`.
        parameters: numbers in all tensors.
        type: that most of them have, or the mixture's name.
        size: of the weights' files, in bytes.
        modified_at: of the newest file, seconds since 1970.
        digest: 64 hexadecimal digits, of the files' names, sizes and beginnings.
        metadata: single values under GGUF's names.
    """

    format: str = ""
    architecture: str = ""
    parameters: int = 0
    type: str = ""
    size: int = 0
    modified_at: int = 0
    digest: str = ""
    metadata: dict[str, int | float | bool | str] = {}


def checkpoint_facts(path: Path) -> CheckpointFacts:
    """The facts of a GGUF file or a Hugging Face directory. Whoever loads it says what is wrong with it; here that is
    left empty."""
    try:
        return _of_directory(path) if path.is_dir() else _of_gguf(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error, CheckpointError):
        return CheckpointFacts()


def _of_gguf(path: Path) -> CheckpointFacts:
    file = GGUFFile(path)
    metadata = {key: value for key, value in file.metadata.scalars().items() if _is_short(value)}
    types: Counter[str] = Counter()
    for info in file.tensors.values():
        types[info.type] += math.prod(info.shape)
    mixture = _FILE_TYPES.get(metadata.get("general.file_type", -1))  # type: ignore[arg-type]
    architecture = str(metadata.get("general.architecture", ""))
    return _facts("gguf", architecture, types, mixture, metadata, [path])


def _of_directory(path: Path) -> CheckpointFacts:
    config: Any = json.loads((path / "config.json").read_text("utf-8-sig"))
    if not isinstance(config, dict):
        return CheckpointFacts()
    architecture = str(config.get("model_type", ""))
    files = sorted(path.glob("*.safetensors"))
    types: Counter[str] = Counter()
    for file in files:
        types.update(_values_by_type(file))
    metadata: dict[str, int | float | bool | str] = {"general.architecture": architecture}
    for key, name in _KEYS.items():
        value = config.get(key)
        if isinstance(value, int | float) and _is_short(value):
            metadata[f"{architecture}.{name}"] = value
    return _facts("safetensors", architecture, types, None, metadata, files)


def _values_by_type(file: Path) -> Counter[str]:
    """How many values of each type a safetensors file's header tells of."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(min(length, _MAX_HEADER)))
    types: Counter[str] = Counter()
    for name, tensor in header.items():
        if name != "__metadata__":
            types[str(tensor["dtype"])] += math.prod(tensor["shape"])
    return types


def _facts(
    form: str,
    architecture: str,
    types: Mapping[str, int],
    mixture: str | None,
    metadata: dict[str, int | float | bool | str],
    files: Iterable[Path],
) -> CheckpointFacts:
    digest = hashlib.sha256()
    size = modified_at = 0
    for file in files:
        status = file.stat()
        size += status.st_size
        modified_at = max(modified_at, int(status.st_mtime))
        with file.open("rb") as opened:
            digest.update(f"{file.name} {status.st_size} ".encode() + opened.read(_HASHED))
    parameters = sum(types.values())
    return CheckpointFacts(
        form,
        architecture,
        parameters,
        mixture or max(types, key=lambda name: types[name], default=""),
        size,
        modified_at,
        digest.hexdigest(),
        {**metadata, "general.parameter_count": parameters},
    )


def _is_short(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return not isinstance(value, float) or math.isfinite(value)
