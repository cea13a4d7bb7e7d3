"""`ModelConfig`: what a checkpoint says about its model, whatever form the checkpoint has."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from actors.checkpoint.errors import CheckpointError
from actors.checkpoint.gguf import GGUFFile, MetadataValue
from actors.checkpoint.names import module_of_gguf

HF_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_KINDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rope scaling and the numbers that each needs."""
TORCH_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""ggml's names of torch's types."""


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder-only model of the Llama family.

    Attributes:
        architecture: as Hugging Face names it, whatever the checkpoint's form.
        rope_scaling: None, or the numbers of ROPE_KINDS with their kind under "rope_type".
        sliding_window: keys that a query sees, itself included; None for all.
        eos_token_ids: ids that end a generation, the most important first.
        weight_type: ggml's name of the type that most of the matrices' values have, such as "Q4_1" or "BF16".
        matrix_types: by Hugging Face's name of the module, the types of the matrices that have another.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rope_theta: float
    rms_eps: float
    tie_embeddings: bool
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_ids: list[int] = []
    eos_token_ids: list[int] = []
    weight_type: str = "F32"
    matrix_types: dict[str, str] = {}


def read_config(path: Path) -> ModelConfig:
    """The configuration of a GGUF file or of a Hugging Face directory.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a model that is not supported.
    """
    if path.is_dir():
        config = _from_directory(path)
    elif path.is_file():
        config = _from_gguf(GGUFFile(path))
    else:
        raise CheckpointError(f"{path}: no such file or directory; give a GGUF file or a Hugging Face model directory")
    _check(path, config)
    return config


def checkpoint_identity(path: Path, config: ModelConfig) -> str:
    """16 hexadecimal digits that two copies of one checkpoint share: of the configuration, and the weights' sizes."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files]
    return hashlib.sha256(msgspec.json.encode((config, sizes))).hexdigest()[:16]


def _check(path: Path, config: ModelConfig) -> None:
    limits = {
        "hidden_size": 2**17,
        "num_layers": 2**10,
        "num_heads": 2**10,
        "num_kv_heads": 2**10,
        "head_dim": 2**10,
        "intermediate_size": 2**20,
        "vocab_size": 2**24,
        "max_position": 2**26,
    }
    for name, limit in limits.items():
        if not 1 <= getattr(config, name) <= limit:
            raise CheckpointError(f"{path}: a {name} of {getattr(config, name)} makes no sense")
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} key-value heads")
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: a head of {config.head_dim} dimensions cannot be rotated, it must be even")
    for name in ("rope_theta", "rms_eps"):
        if not 0 < getattr(config, name) < math.inf:
            raise CheckpointError(f"{path}: {name} must be a positive number, not {getattr(config, name)}")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise CheckpointError(f"{path}: a sliding window of {config.sliding_window} tokens makes no sense")
    for token in (*config.bos_token_ids, *config.eos_token_ids):
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{path}: token {token} is outside the vocabulary of {config.vocab_size}")


def _rope_scaling(path: Path, kind: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """`values` checked against ROPE_KINDS, with the numbers a kind may have besides."""
    if kind in ("default", "none"):
        return None
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"{path}: rope scaling {kind!r} is not supported; supported are default, {', '.join(ROPE_KINDS)}"
        )
    for name in ROPE_KINDS[kind]:
        value = values.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{path}: rope scaling {kind!r} needs a positive number {name!r}, not {value!r}")
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    names = [*ROPE_KINDS[kind], *(optional if kind == "yarn" else ())]
    return {"rope_type": kind, **{name: values[name] for name in names if values.get(name) is not None}}


# -- Hugging Face directories --------------------------------------------------------------------------------------


class _HFConfig(msgspec.Struct):
    """The entries of config.json that matter here; transformers 4 and 5 spell rope and dtype differently."""

    architectures: list[str] = []
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    max_window_layers: int | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None


class _GenerationConfig(msgspec.Struct):
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


def _from_directory(path: Path) -> ModelConfig:
    hf = _decode(path / "config.json", _HFConfig)
    architecture = hf.architectures[0] if hf.architectures else "of no name"
    if architecture not in HF_ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture} is not supported; supported are {', '.join(HF_ARCHITECTURES)}"
        )
    if hf.quantization_config is not None:
        method = hf.quantization_config.get("quant_method", "unknown")
        raise CheckpointError(
            f"{path}: quantization {method!r} is not supported; use unquantized weights or a GGUF file"
        )
    if hf.hidden_act != "silu":
        raise CheckpointError(f"{path}: activation {hf.hidden_act!r} is not supported; supported is silu")
    rope = hf.rope_parameters or hf.rope_scaling or {}
    if hf.partial_rotary_factor != 1.0 or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: rotary embeddings of a part of the head are not supported")
    generation_path = path / "generation_config.json"
    generation = _decode(generation_path, _GenerationConfig) if generation_path.exists() else _GenerationConfig()
    qwen2 = architecture == "Qwen2ForCausalLM"
    theta = hf.rope_theta if hf.rope_theta is not None else rope.get("rope_theta", 10000.0)
    if not isinstance(theta, int | float):
        raise CheckpointError(f"{path}: rope_theta must be a number, not {theta!r}")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=hf.head_dim or hf.hidden_size // max(hf.num_attention_heads, 1),
        intermediate_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_position=hf.max_position_embeddings,
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(
            path,
            str(rope.get("rope_type") or rope.get("type") or "default"),
            {"original_max_position_embeddings": hf.max_position_embeddings, **rope},
        ),
        rms_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=qwen2 or hf.attention_bias,
        attention_out_bias=hf.attention_bias and not qwen2,
        mlp_bias=hf.mlp_bias and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(path, hf, architecture),
        bos_token_ids=_merge(generation.bos_token_id, hf.bos_token_id),
        eos_token_ids=_merge(generation.eos_token_id, hf.eos_token_id),
        weight_type=TORCH_TYPES.get(hf.dtype or hf.torch_dtype or "float32", "F32"),
    )


def _sliding_window(path: Path, hf: _HFConfig, architecture: str) -> int | None:
    """The window of all layers, or None. A mixture of windowed and full layers is refused."""
    if hf.sliding_window is None or architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        return hf.sliding_window
    if not hf.use_sliding_window:
        return None
    full_layers = hf.max_window_layers if hf.max_window_layers is not None else 28
    kinds = hf.layer_types or [
        "full_attention" if layer < full_layers else "sliding_attention" for layer in range(hf.num_hidden_layers)
    ]
    if set(kinds) <= {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return hf.sliding_window
    raise CheckpointError(f"{path}: layers of different kinds ({', '.join(sorted(set(kinds)))}) are not supported")


def _merge(*groups: int | list[int] | None) -> list[int]:
    ids: list[int] = []
    for group in groups:
        ids.extend([group] if isinstance(group, int) else group or [])
    return list(dict.fromkeys(ids))


def _decode(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


# -- GGUF files ----------------------------------------------------------------------------------------------------


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


def _from_gguf(file: GGUFFile) -> ModelConfig:
    general = _Keys(file, "")
    name = general.text("general.architecture", "")
    architecture = GGUF_ARCHITECTURES.get(name)
    if architecture is None:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; supported are {', '.join(GGUF_ARCHITECTURES)}"
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
        rope_scaling=_gguf_rope_scaling(file, keys, head_dim),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=keys.integer("attention.sliding_window") if keys.has("attention.sliding_window") else None,
        bos_token_ids=_merge(*(general.integer(key) for key in bos if general.has(key))),
        eos_token_ids=_merge(*(general.integer(key) for key in eos if general.has(key))),
        weight_type=weight_type,
        matrix_types=matrix_types,
    )


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


def _gguf_rope_scaling(file: GGUFFile, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, keys.number("rope.freq_base", 10000.0), head_dim)
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    values = {"factor": keys.number("rope.scaling.factor"), "original_max_position_embeddings": original}
    return _rope_scaling(file.path, kind, values)


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
