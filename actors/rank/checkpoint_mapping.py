"""What each tensor of a shard is put together from: parts of a checkpoint's tensors, by their Hugging Face names."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from llm_runtime.actors.checkpoint import Experts, Latent, ModelConfig
from llm_runtime.actors.rank.checkpoint_reader import CheckpointReader
from llm_runtime.actors.rank.shard import Shard


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint's tensor.

    Attributes:
        name: of the tensor. shape: of the whole. rows, columns: those that are meant; a vector has one row.
        transposed: rows become columns.
        padded: the rows and columns that it takes up where zeros fill what it has not itself.
    """

    name: str
    shape: tuple[int, ...]
    rows: range
    columns: range
    transposed: bool = False
    padded: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        """Rows that it takes up."""
        if self.padded is not None:
            return self.padded[0]
        return len(self.columns if self.transposed else self.rows)

    def read(self, source: CheckpointReader) -> Tensor:
        """As `CheckpointReader.read`, transposed and padded."""
        values = source.read(self.name, self.shape, self.rows, self.columns)
        if self.transposed:
            values = values.T
        if self.padded is not None and self.padded != tuple(values.shape):
            rows, columns = self.padded
            values = F.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))
        return values

    def read_four_bits(self, source: CheckpointReader) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `CheckpointReader.read_four_bits`; None for a part that is not taken as it is."""
        if self.transposed or self.padded is not None:
            return None
        return source.read_four_bits(self.name, self.shape, self.rows, self.columns)


def parts_of(config: ModelConfig, shard: Shard, name: str) -> list[Part]:
    """What the tensor `name` of a shard is put together from, one below the other; nothing, if it is zeros."""
    hidden, vocab = config.hidden_size, config.vocab_size
    everything = range(hidden)
    if name == "embedding":
        return [_matrix("model.embed_tokens", vocab, hidden, range(vocab), everything)]
    if name == "lm_head":
        module = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        return [_matrix(module, vocab, hidden, shard.vocab, everything)]
    if name == "final_norm":
        return [_vector("model.norm.weight", hidden, everything)]
    layer, _, kind = name.partition(".")
    prefix = f"model.layers.{layer}."
    match kind:
        case "attention_norm":
            return [_vector(prefix + "input_layernorm.weight", hidden, everything)]
        case "mlp_norm":
            return [_vector(prefix + "post_attention_layernorm.weight", hidden, everything)]
        case "gate_up" | "gate_up_bias" | "down" | "down_bias":
            return _of_mlp(config, shard, prefix + "mlp.", kind)
        case "o_bias":
            # The ranks' results are added up, so one of them adds the bias.
            return [] if shard.rank else [_vector(prefix + "self_attn.o_proj.bias", hidden, everything)]
    if config.experts is not None and kind.startswith(("router", "experts_", "shared_")):
        return _of_experts(config.experts, hidden, shard, prefix + "mlp.", kind)
    if config.latent is not None:
        return _of_latent_attention(config, config.latent, shard, prefix + "self_attn.", kind)
    return _of_attention(config, shard, prefix + "self_attn.", kind)


def _matrix(module: str, outputs: int, inputs: int, rows: range, columns: range) -> Part:
    return Part(f"{module}.weight", (outputs, inputs), rows, columns)


def _vector(tensor: str, length: int, part: range) -> Part:
    return Part(tensor, (length,), range(1), part)


def _times(indices: range, size: int) -> range:
    """The rows of heads that have `size` of them each."""
    return range(indices.start * size, indices.stop * size)


def _of_attention(config: ModelConfig, shard: Shard, attention: str, kind: str) -> list[Part]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = _times(shard.heads, dim), _times(shard.kv_heads, dim)
    all_queries, all_keys = config.num_heads * dim, config.num_kv_heads * dim
    projections = [
        (attention + "q_proj", all_queries, queries),
        (attention + "k_proj", all_keys, keys),
        (attention + "v_proj", all_keys, keys),
    ]
    match kind:
        case "qkv":
            return [_matrix(module, outputs, hidden, rows, range(hidden)) for module, outputs, rows in projections]
        case "qkv_bias":
            return [_vector(f"{module}.bias", outputs, rows) for module, outputs, rows in projections]
        case "o":
            return [_matrix(attention + "o_proj", hidden, all_queries, range(hidden), queries)]
        case "q_norm" | "k_norm":
            return [_vector(f"{attention}{kind}.weight", dim, range(dim))]
    raise AssertionError(kind)


def _of_latent_attention(config: ModelConfig, latent: Latent, shard: Shard, attention: str, kind: str) -> list[Part]:
    hidden, heads = config.hidden_size, config.num_heads
    queries, all_queries = _times(shard.heads, config.head_dim), heads * config.head_dim
    cached = latent.kv_rank + latent.rope_dim
    each = latent.nope_dim + latent.value_dim
    whole = range(hidden)
    match kind:
        case "qkv":
            first = (
                _matrix(attention + "q_proj", all_queries, hidden, queries, whole)
                if latent.q_rank is None
                else _matrix(attention + "q_a_proj", latent.q_rank, hidden, range(latent.q_rank), whole)
            )
            return [first, _matrix(attention + "kv_a_proj_with_mqa", cached, hidden, range(cached), whole)]
        case "qkv_bias":
            assert latent.q_rank is not None
            return [
                _vector(attention + "q_a_proj.bias", latent.q_rank, range(latent.q_rank)),
                _vector(attention + "kv_a_proj_with_mqa.bias", cached, range(cached)),
            ]
        case "q_norm":
            assert latent.q_rank is not None
            return [_vector(attention + "q_a_layernorm.weight", latent.q_rank, range(latent.q_rank))]
        case "q":
            assert latent.q_rank is not None
            return [_matrix(attention + "q_b_proj", all_queries, latent.q_rank, queries, range(latent.q_rank))]
        case "kv_norm":
            return [_vector(attention + "kv_a_layernorm.weight", latent.kv_rank, range(latent.kv_rank))]
        case "k_absorb" | "v_up":
            parts = []
            for head in shard.heads:
                keys = range(head * each, head * each + latent.nope_dim)
                rows = keys if kind == "k_absorb" else range(keys.stop, (head + 1) * each)
                name, shape = attention + "kv_b_proj.weight", (heads * each, latent.kv_rank)
                parts.append(Part(name, shape, rows, range(latent.kv_rank), transposed=kind == "k_absorb"))
            return parts
        case "o":
            values = _times(shard.heads, latent.value_dim)
            return [_matrix(attention + "o_proj", hidden, heads * latent.value_dim, whole, values)]
    raise AssertionError(kind)


def _of_mlp(config: ModelConfig, shard: Shard, mlp: str, kind: str) -> list[Part]:
    hidden, size, inner = config.hidden_size, config.intermediate_size, shard.intermediate
    gates = (mlp + "gate_proj", mlp + "up_proj")
    match kind:
        case "gate_up":
            return [_matrix(module, size, hidden, inner, range(hidden)) for module in gates]
        case "gate_up_bias":
            return [_vector(f"{module}.bias", size, inner) for module in gates]
        case "down":
            return [_matrix(mlp + "down_proj", hidden, size, range(hidden), inner)]
        case "down_bias":
            return [] if shard.rank else [_vector(mlp + "down_proj.bias", hidden, range(hidden))]
    raise AssertionError(kind)


def _of_experts(experts: Experts, hidden: int, shard: Shard, mlp: str, kind: str) -> list[Part]:
    whole, size, width = range(hidden), experts.intermediate_size, shard.expert_width
    match kind:
        case "router":
            return [_matrix(mlp + "gate", experts.count, hidden, range(experts.count), whole)]
        case "router_bias":
            return [_vector(mlp + "gate.e_score_correction_bias", experts.count, range(experts.count))]
        case "experts_gate_up":
            return [
                Part(
                    f"{mlp}experts.{expert}.{module}.weight",
                    (size, hidden),
                    shard.expert,
                    whole,
                    padded=(width, hidden),
                )
                for expert in range(experts.count)
                for module in ("gate_proj", "up_proj")
            ]
        case "experts_down":
            return [
                Part(
                    f"{mlp}experts.{expert}.down_proj.weight",
                    (hidden, size),
                    whole,
                    shard.expert,
                    padded=(hidden, width),
                )
                for expert in range(experts.count)
            ]
        case "shared_gate_up":
            modules = (mlp + "shared_experts.gate_proj", mlp + "shared_experts.up_proj")
            return [_matrix(module, experts.shared_size, hidden, shard.shared, whole) for module in modules]
        case "shared_down":
            return [_matrix(mlp + "shared_experts.down_proj", hidden, experts.shared_size, whole, shard.shared)]
    raise AssertionError(kind)
