"""The configuration of the model in a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from llm_runtime.actors.checkpoint.config import Experts, Latent, ModelConfig, distinct, rope_scaling, scaled_length
from llm_runtime.actors.checkpoint.config_of_transformers import config_of_transformers
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.json_file import read_json
from llm_runtime.actors.checkpoint.plugins import plugin
from llm_runtime.actors.checkpoint.tokenizer_eos import eos_of_tokenizer

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "DeepseekV3ForCausalLM",
)
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""Other names of architectures."""
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""Architectures of configurations that do not name one, by `model_type`."""
_WHERE_NOT_STATED: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "Glm4MoeForCausalLM": {
        **{"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
        **{"first_k_dense_replace": 1, "n_routed_experts": 128, "n_shared_experts": 1},
    },
    "DeepseekV3ForCausalLM": {
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
        **{"v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
        "routed_scaling_factor": 2.5,
    },
}
"""What transformers takes for keys that a configuration lacks, where it is not what `_Config` says."""
_SILU = ("silu", "swish")
TORCH_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""ggml's names of torch's types."""


class _AnyConfig(msgspec.Struct):
    """The entries of config.json that matter here whatever the architecture is."""

    architectures: list[str] = []
    model_type: str = ""
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None


class _Config(msgspec.Struct):
    """The entries of config.json that matter here; transformers 4 and 5 spell rope and dtype differently."""

    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    original_max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    is_causal: bool = True
    use_qk_norm: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    max_window_layers: int | None = None
    quantization_config: dict[str, Any] | None = None
    # Latent attention.
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool | None = None
    # Mixtures of experts.
    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0


class _GenerationConfig(msgspec.Struct):
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


def config_of_directory(path: Path, read_as: str | None = None) -> ModelConfig:
    """The configuration, not checked. Raises CheckpointError if a part is missing or not supported.

    Args:
        read_as: an architecture to take in the place of the one that is stated.
    """
    any_config = _decode(path / "config.json", _AnyConfig)
    named = any_config.architectures or [_BY_MODEL_TYPE.get(any_config.model_type, "of no name")]
    named = [ALIASES.get(name, name) for name in named]
    architecture = read_as or next((name for name in named if name in ARCHITECTURES), named[0])
    generation_path = path / "generation_config.json"
    generation = _decode(generation_path, _GenerationConfig) if generation_path.exists() else _GenerationConfig()
    common: dict[str, Any] = {
        "bos_token_ids": distinct(generation.bos_token_id, any_config.bos_token_id),
        "eos_token_ids": distinct(generation.eos_token_id, any_config.eos_token_id, eos_of_tokenizer(path)),
        "weight_type": TORCH_TYPES.get(any_config.dtype or any_config.torch_dtype or "float32", "F32"),
    }
    kind = _read_as(path, architecture)
    if kind is None:
        return config_of_transformers(path, architecture, ARCHITECTURES, common)
    hf = _decode(path / "config.json", _Config, _WHERE_NOT_STATED.get(kind))
    if hf.hidden_act not in _SILU:
        raise CheckpointError(f"{path}: activation {hf.hidden_act!r} is not supported; supported is silu")
    if not hf.is_causal:
        raise CheckpointError(
            f"{path}: is_causal is false, so its tokens see those behind them, which is not supported for {kind}"
        )
    rope = hf.rope_scaling or hf.rope_parameters or {}
    kind_of_rope = rope.get("rope_type") or rope.get("type")
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: rope parameters that differ between layers are not supported")
    if kind_of_rope is None and rope.get("factor", 1.0) != 1.0:
        raise CheckpointError(
            f"{path}: rope_scaling has a factor and no rope_type, so it is of no effect; add the type, or remove it"
        )
    theta = rope.get("rope_theta", 10000.0 if hf.rope_theta is None else hf.rope_theta)
    if not isinstance(theta, int | float):
        raise CheckpointError(f"{path}: rope_theta must be a number, not {theta!r}")
    # What stands beside these numbers goes before what stands among them, as in transformers.
    original = hf.original_max_position_embeddings or rope.get("original_max_position_embeddings")
    numbers = {**rope, "original_max_position_embeddings": original or hf.max_position_embeddings}
    if kind_of_rope == "yarn" and rope.get("factor") is None and isinstance(original, int) and original > 0:
        numbers["factor"] = hf.max_position_embeddings / original
    scaling = rope_scaling(path, str(kind_of_rope or "default"), numbers)
    latent = _latent(path, hf) if kind == "DeepseekV3ForCausalLM" else None
    if latent is None:
        head_dim = hf.head_dim or hf.hidden_size // max(hf.num_attention_heads, 1)
        kv_heads = hf.num_key_value_heads or hf.num_attention_heads
    else:
        head_dim, kv_heads = latent.nope_dim + latent.rope_dim, hf.num_attention_heads
    qwen2, glm = kind == "Qwen2ForCausalLM", kind == "Glm4MoeForCausalLM"
    return ModelConfig(
        architecture=architecture,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_position=scaled_length(hf.max_position_embeddings, scaling),
        rope_theta=float(theta),
        rope_scaling=scaling,
        rms_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=qwen2 or hf.attention_bias,
        attention_out_bias=hf.attention_bias and not qwen2 and not glm,
        mlp_bias=hf.mlp_bias and kind == "LlamaForCausalLM",
        qk_norm=hf.use_qk_norm if glm else kind in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        sliding_window=_sliding_window(path, hf, kind),
        rotary_dim=latent.rope_dim if latent else _rotary_dim(path, hf, rope, head_dim if glm else None),
        latent=latent,
        experts=_experts(path, hf, kind),
        fp8_block=_fp8_block(path, hf.quantization_config),
        **common,
    )


def _read_as(path: Path, architecture: str) -> str | None:
    """The architecture of ARCHITECTURES whose configuration and tensors a checkpoint has; None for others."""
    if architecture in ARCHITECTURES:
        return architecture
    try:
        other = plugin(architecture)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{path}: the package for architecture {architecture} cannot be used ({error})") from None
    if other is None:
        return None
    reads_as = getattr(other, "reads_as", None)
    if reads_as not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: the class for architecture {architecture} reads checkpoints as {reads_as!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return str(reads_as)


def _rotary_dim(path: Path, hf: _Config, rope: dict[str, Any], head_dim: int | None) -> int | None:
    """Rotated dimensions of a head, None for all; where `head_dim` is None, a part of them is refused."""
    factor = rope.get("partial_rotary_factor", hf.partial_rotary_factor)
    if factor is None:
        factor = 1.0 if head_dim is None else 0.5
    if not isinstance(factor, int | float) or (head_dim is None and factor != 1.0):
        raise CheckpointError(f"{path}: rotary embeddings of a part of the head are not supported")
    return None if head_dim is None else int(head_dim * factor)


def _sliding_window(path: Path, hf: _Config, architecture: str) -> int | None:
    """The window of all layers, or None. A mixture of windowed and full layers is refused."""
    if hf.sliding_window is None or architecture in ("LlamaForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"):
        return None
    if architecture == "MistralForCausalLM":
        return hf.sliding_window
    if not hf.use_sliding_window:
        return None
    if architecture == "Qwen3MoeForCausalLM":
        return hf.sliding_window
    full_layers = hf.max_window_layers if hf.max_window_layers is not None else 28
    kinds = hf.layer_types or [
        "full_attention" if layer < full_layers else "sliding_attention" for layer in range(hf.num_hidden_layers)
    ]
    if set(kinds) <= {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return hf.sliding_window
    raise CheckpointError(f"{path}: layers of different kinds ({', '.join(sorted(set(kinds)))}) are not supported")


def _latent(path: Path, hf: _Config) -> Latent:
    if hf.attention_bias and hf.q_lora_rank is None:
        raise CheckpointError(f"{path}: attention_bias is not supported where q_lora_rank is null")
    if hf.num_key_value_heads not in (None, hf.num_attention_heads):
        raise CheckpointError(
            f"{path}: num_key_value_heads is {hf.num_key_value_heads}, and with latent attention it must be "
            f"num_attention_heads, {hf.num_attention_heads}"
        )
    return Latent(
        q_rank=hf.q_lora_rank,
        kv_rank=hf.kv_lora_rank,
        rope_dim=hf.qk_rope_head_dim,
        nope_dim=hf.qk_nope_head_dim,
        value_dim=hf.v_head_dim,
        interleaved=True if hf.rope_interleave is None else hf.rope_interleave,
    )


def _experts(path: Path, hf: _Config, architecture: str) -> Experts | None:
    """The experts of the layers that have some; None if there are none."""
    if architecture == "Qwen3MoeForCausalLM":
        return _experts_of_qwen(path, hf)
    if architecture not in ("Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"):
        return None
    for key, supported in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1)):
        if getattr(hf, key) != supported:
            raise CheckpointError(f"{path}: {key} {getattr(hf, key)!r} is not supported; supported is {supported!r}")
    return Experts(
        layers=list(range(max(hf.first_k_dense_replace, 0), hf.num_hidden_layers)),
        count=hf.n_routed_experts or hf.num_local_experts or 0,
        top_k=hf.num_experts_per_tok,
        intermediate_size=hf.moe_intermediate_size,
        shared_size=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
        scoring="sigmoid",
        bias=True,
        groups=hf.n_group or 1,
        top_groups=hf.topk_group or 1,
        normalize=True if hf.norm_topk_prob is None else hf.norm_topk_prob,
        scaling=hf.routed_scaling_factor,
    )


def _experts_of_qwen(path: Path, hf: _Config) -> Experts | None:
    if hf.decoder_sparse_step < 1:
        raise CheckpointError(f"{path}: decoder_sparse_step must be 1 or more, not {hf.decoder_sparse_step}")
    count = hf.num_experts or hf.num_local_experts or 0
    dense = set(hf.mlp_only_layers or [])
    layers = [
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in dense and not (layer + 1) % hf.decoder_sparse_step
    ]
    if not count or not layers:
        return None
    return Experts(
        layers=layers,
        count=count,
        top_k=hf.num_experts_per_tok,
        intermediate_size=hf.moe_intermediate_size,
        shared_size=0,
        scoring="softmax",
        bias=False,
        groups=1,
        top_groups=1,
        normalize=bool(hf.norm_topk_prob),
        scaling=1.0,
    )


def _fp8_block(path: Path, quantization: dict[str, Any] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a checkpoint of FP8 matrices, None for one without."""
    if quantization is None:
        return None
    method = quantization.get("quant_method", "unknown")
    if method != "fp8":
        raise CheckpointError(
            f"{path}: quantization {method!r} is not supported; use unquantized weights, FP8 in blocks or a GGUF file"
        )
    match quantization.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case block:
            raise CheckpointError(
                f"{path}: quantization 'fp8' with a weight_block_size of {block!r} is not supported; supported are two "
                "numbers, as in [128, 128]"
            )


def _decode(path: Path, kind: type[Any], not_stated: dict[str, Any] | None = None) -> Any:
    """What matters of a configuration. A key that is null is "none", or what `kind` says where there is no "none".

    Args:
        not_stated: values of keys that are not there.
    """
    entries = {**(not_stated or {}), **read_json(path, dict[str, Any], empty={})}
    try:
        return msgspec.convert({key: value for key, value in entries.items() if value is not None}, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from None
