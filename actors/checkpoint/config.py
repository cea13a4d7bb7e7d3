"""`ModelConfig`: what a checkpoint says about its model, whatever form the checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from llm_runtime.actors.checkpoint.errors import CheckpointError

ROPE_KINDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rope scaling and the numbers that each needs."""
EXPERT_ROWS = 64
"""An expert's part of a stacked matrix begins where a panel of so many rows does."""


class Latent(msgspec.Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): one cached vector for all heads.

    Attributes:
        q_rank: size of the vector that queries are expanded from; None where they come from the state itself.
        kv_rank: size of the cached vector that keys and values are expanded from.
        rope_dim: dimensions that are rotated: the end of each query, and one key for all heads.
        nope_dim: the other dimensions of queries and keys. value_dim: those of values.
        interleaved: the rotary embedding pairs neighbours, not the two halves.
    """

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    interleaved: bool


class Experts(msgspec.Struct, frozen=True):
    """The mixture of experts that some layers have for their MLP.

    Attributes:
        layers: which layers.
        count: experts of a layer, and `top_k` of them compute a token.
        intermediate_size: of one expert. shared_size: that of the expert that computes every token; 0 for none.
        scoring: what makes scores of the router's logits.
        bias: a correction is added to the scores by which experts are chosen.
        groups: experts are chosen from the best `top_groups` of so many groups alone.
        normalize: the scores of a token's experts are divided by their sum. scaling: then multiplied with this.
    """

    layers: list[int]
    count: int
    top_k: int
    intermediate_size: int
    shared_size: int
    scoring: Literal["softmax", "sigmoid"]
    bias: bool
    groups: int
    top_groups: int
    normalize: bool
    scaling: float


class TransformersShape(msgspec.Struct, frozen=True):
    """A model that transformers' own implementation runs, over the pages of this runtime.

    Attributes:
        parameters: numbers in the checkpoint, in so many `tensors`.
    """

    parameters: int
    tensors: int


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder-only model: of the Llama family, or with latent attention, or with mixtures of experts.

    Attributes:
        architecture: as Hugging Face names it, whatever the checkpoint's form.
        head_dim: dimensions of a query.
        rope_scaling: None, or the numbers of ROPE_KINDS with their kind under "rope_type".
        sliding_window: keys that a query sees, itself included; None for all.
        eos_token_ids: ids that end a generation, the most important first.
        weight_type: ggml's name of the type that most of the matrices' values have, such as "Q4_1" or "BF16".
        matrix_types: by Hugging Face's name of the module, the types of the matrices that have another.
        rotary_dim: dimensions of a head that are rotated; None for all.
        fp8_block: rows and columns that share a scale where matrices are stored as FP8.
        foreign: None for a model that is implemented here; the other fields are not all meant where it is not.
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
    rotary_dim: int | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    fp8_block: tuple[int, int] | None = None
    transformers: TransformersShape | None = None


def check_config(path: Path, config: ModelConfig) -> None:
    """Raises CheckpointError for numbers that make no sense, by themselves or together."""
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
    _check_limits(path, config, limits)
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} key-value heads")
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: a head of {config.head_dim} dimensions cannot be rotated, it must be even")
    rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= config.head_dim:
        raise CheckpointError(f"{path}: {rotary_dim} of {config.head_dim} dimensions of a head cannot be rotated")
    for name in ("rope_theta", "rms_eps"):
        if not 0 < getattr(config, name) < math.inf:
            raise CheckpointError(f"{path}: {name} must be a positive number, not {getattr(config, name)}")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise CheckpointError(f"{path}: a sliding window of {config.sliding_window} tokens makes no sense")
    if config.latent is not None:
        _check_limits(path, config.latent, dict.fromkeys(("kv_rank", "rope_dim", "nope_dim", "value_dim"), 2**14))
        if config.latent.q_rank is not None:
            _check_limits(path, config.latent, {"q_rank": 2**14})
    if config.experts is not None:
        _check_experts(path, config, config.experts)


def _check_limits(path: Path, values: msgspec.Struct, limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        if not 1 <= getattr(values, name) <= limit:
            raise CheckpointError(f"{path}: a {name} of {getattr(values, name)} makes no sense")


def _check_experts(path: Path, config: ModelConfig, experts: Experts) -> None:
    _check_limits(path, experts, {"count": 2**14, "intermediate_size": 2**20, "groups": 2**10})
    if not all(0 <= layer < config.num_layers for layer in experts.layers):
        raise CheckpointError(f"{path}: experts in the layers {experts.layers} of {config.num_layers} make no sense")
    each, more = divmod(experts.count, experts.groups)
    if more or not 1 <= experts.top_groups <= experts.groups or (experts.groups > 1 and each < 2):
        raise CheckpointError(
            f"{path}: {experts.top_groups} of {experts.groups} groups cannot be chosen from {experts.count} experts"
        )
    if not 1 <= experts.top_k <= experts.top_groups * each:
        raise CheckpointError(
            f"{path}: num_experts_per_tok is {experts.top_k}, and there are {experts.top_groups * each} to choose from"
        )
    if experts.shared_size < 0 or not 0 < experts.scaling < math.inf:
        raise CheckpointError(f"{path}: shared experts or routed_scaling_factor make no sense")
    if config.hidden_size % EXPERT_ROWS:
        raise CheckpointError(
            f"{path}: hidden_size is {config.hidden_size}, and with experts it must be a multiple of {EXPERT_ROWS}"
        )


def rope_scaling(path: Path, kind: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
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


def scaled_length(length: int, scaling: Mapping[str, Any] | None) -> int:
    """Positions that a model can use: those that its configuration names, or more, where a stretched rotary embedding
    is made for more, as in the recipe of Qwen's model cards. Llama 3.1's configurations name the stretched length."""
    if scaling is None or scaling["rope_type"] == "llama3":
        return length
    trained = scaling["original_max_position_embeddings"] if scaling["rope_type"] == "yarn" else length
    return max(length, int(trained * scaling["factor"]))


def distinct(*groups: int | list[int] | None) -> list[int]:
    """All ids of these groups, each once, in their order."""
    ids: list[int] = []
    for group in groups:
        ids.extend([group] if isinstance(group, int) else group or [])
    return list(dict.fromkeys(ids))
