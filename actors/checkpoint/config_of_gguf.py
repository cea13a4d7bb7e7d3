"""The configuration of the model in a GGUF file."""

from __future__ import annotations

import math
import struct
from collections import Counter
from typing import Any

from llm_runtime.actors.checkpoint.config import ModelConfig, distinct, rope_scaling
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.gguf import GGUFFile, MetadataValue
from llm_runtime.actors.checkpoint.names import module_of_gguf

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""llama.cpp's names of Hugging Face's architectures."""


_CONTROL = 3
ENDS_OF_TURNS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"}
"""Control tokens that end an answer whatever a file's metadata says, as to llama.cpp (`llama_vocab::impl::load`)."""


class _Keys:
    """Typed access to a GGUF file's metadata, with the architecture's prefix."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.file.path}: {self.prefix}{name} must be one whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.file.path}: {self.prefix}{name} must be a number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.file.path}: {self.prefix}{name} must be a text")
        return value

    def has(self, name: str) -> bool:
        return self.prefix + name in self.file.metadata

    def _get(self, name: str, default: MetadataValue | None) -> MetadataValue:
        value = self.file.metadata.get(self.prefix + name, default)
        if value is None:
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix + name!r} is missing")
        return value


def config_of_gguf(file: GGUFFile) -> ModelConfig:
    """The configuration, not checked. Raises CheckpointError if a part is missing or not supported."""
    general = _Keys(file, "")
    name = general.text("general.architecture", "")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(file, f"{name}.")
    if keys.has("expert_count") and keys.integer("expert_count"):
        raise CheckpointError(f"{file.path}: mixtures of experts of architecture {name!r} are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: has no matrix 'token_embd.weight'")
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: keys and values of different sizes are not supported")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: rotary embeddings of a part of the head are not supported")
    bos = ("tokenizer.ggml.bos_token_id",)
    eos = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    weight_type, matrix_types = _matrix_types(file)
    eos_ids = distinct(*(general.integer(key) for key in eos if general.has(key)), _ends_of_turns(file))
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=keys.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate_size=keys.integer("feed_forward_length"),
        vocab_size=embedding.shape[0],
        max_position=keys.integer("context_length"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling_of(file, keys, head_dim),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=keys.integer("attention.sliding_window", 0) or None,
        bos_token_ids=distinct(*(general.integer(key) for key in bos if general.has(key))),
        eos_token_ids=eos_ids,
        weight_type=weight_type,
        matrix_types=matrix_types,
    )


def _ends_of_turns(file: GGUFFile) -> list[int]:
    """Control tokens that end an answer by what they are called: many files name only the end of a text."""
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    return [
        token
        for token, (name, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and name in ENDS_OF_TURNS
    ]


def _matrix_types(file: GGUFFile) -> tuple[str, dict[str, str]]:
    """The type that most of the matrices' values have, and by module the types of the other matrices."""
    values: Counter[str] = Counter()
    types: dict[str, str] = {}
    for name, info in file.tensors.items():
        if len(info.shape) == 2:
            values[info.type] += math.prod(info.shape)
            if module := module_of_gguf(name):
                types[module] = info.type
    most = max(sorted(values), key=values.__getitem__)
    return most, {module: each for module, each in types.items() if each != most}


def _rope_scaling_of(file: GGUFFile, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, keys.number("rope.freq_base", 10000.0), head_dim)
    if keys.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise CheckpointError(f"{file.path}: {keys.prefix}rope.scaling.attn_factor is not supported")
    # Before there were kinds, a file had a factor alone, under either name.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.text("rope.scaling.type", "none" if factor in (0.0, 1.0) else "linear")
    if kind == "none":
        return None
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    values = {"factor": factor, "original_max_position_embeddings": original}
    return rope_scaling(file.path, kind, values)


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisors of the frequencies that llama.cpp stores in its place.

    All models of the family share three of the four numbers, and the fourth is the largest divisor; the divisors that
    follow from them must be the stored ones.
    """
    data = file.data("rope_freqs.weight")
    if file.tensors["rope_freqs.weight"].type != "F32" or len(data) != head_dim * 2:
        raise CheckpointError(f"{file.path}: 'rope_freqs.weight' does not hold {head_dim // 2} numbers of type F32")
    divisors = struct.unpack(f"<{head_dim // 2}f", data)
    factor, low, high, original = max(divisors), 1.0, 4.0, 8192
    for index, divisor in enumerate(divisors):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        if not math.isclose(1 / ((1 - smooth) / factor + smooth), divisor, rel_tol=1e-3):
            raise CheckpointError(f"{file.path}: 'rope_freqs.weight' holds a rope scaling other than Llama 3.1's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
