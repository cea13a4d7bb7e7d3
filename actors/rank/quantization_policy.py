"""Which type each matrix of a model is stored in. Imports no torch."""

from __future__ import annotations

from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.actors.dtypes import WeightDType, compute_dtype

GROUP = 32
"""Inputs that share a scale in int4."""

CLASSES: dict[str, WeightDType] = {
    "F32": "float32",
    "F16": "bfloat16",
    "BF16": "bfloat16",
    "Q4_0": "int4",
    "Q4_1": "int4",
    "Q4_K": "int4",
    "Q5_0": "int8",
    "Q5_1": "int8",
    "Q5_K": "int8",
    "Q6_K": "int8",
    "Q8_0": "int8",
}
"""The type that holds what a ggml type does, in about as many bits."""

MODULES = {
    "embedding": ("model.embed_tokens",),
    "lm_head": ("lm_head",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The modules of a checkpoint that a matrix here is put together from; those of layers without the layer's prefix."""


FLOATS = ("k_absorb", "v_up")
"""Matrices of latent attention that stay plain numbers of the activations' type: they are small, lie between the other
products, and are read in two orders."""


def auto_dtype(config: ModelConfig) -> WeightDType:
    """The type that keeps what most of a checkpoint's weights hold."""
    return CLASSES.get(config.weight_type, "bfloat16")


def matrix_dtype(config: ModelConfig, dtype: WeightDType, name: str, first: int, inputs: int) -> WeightDType:
    """The type of one matrix of a model that is loaded as `dtype`.

    int4 is for matrices that the checkpoint has in 4 bits. What stands out of a file of 4 bits in a finer type was left
    so for its worth, and becomes int8. Of other checkpoints, the layers become int4 and the vocabulary's tables int8.

    Args:
        name: `embedding`, `lm_head`, or of a layer such as `3.qkv`; see `actors.rank.shard`.
        first, inputs: the input features that a rank holds.
    """
    layer, _, kind = name.rpartition(".")
    if kind == "router":  # chooses between experts whose scores may be close
        return "float32"
    if kind in FLOATS:
        return compute_dtype(dtype)
    if dtype != "int4":
        return dtype
    if kind == "lm_head" and config.tie_embeddings:
        kind = "embedding"
    prefix = f"model.layers.{layer}." if layer else ""
    types = {config.matrix_types.get(prefix + module, config.weight_type) for module in MODULES.get(kind, ())}
    quantized = CLASSES.get(config.weight_type) == "int4"
    four_bits = {CLASSES.get(each) for each in types} == {"int4"} if quantized or not layer else True
    if not four_bits:
        return "int8"
    return "bfloat16" if first % GROUP or inputs % GROUP else "int4"
