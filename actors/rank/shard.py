"""Which part of a model one tensor-parallel rank holds, and where it lies in its weights arena. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import Experts, Latent, ModelConfig
from llm_runtime.actors.dtypes import WeightDType, compute_dtype
from llm_runtime.actors.kv_format import KVDType, KVFormat
from llm_runtime.actors.rank.quantization_policy import FLOATS, GROUP, matrix_dtype

ALIGNMENT = 64
HEADER_BYTES = 262_144
"""Before the tensors: what the arena holds. A checkpoint may have a thousand files, and as many types of matrices."""
PANEL_ROWS = 64
"""Rows of a panel of `kernels.PackedWeight`."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}


@dataclass(frozen=True)
class Shard:
    """Contiguous ranges of a model's parts. The ranges of all ranks, one after the other, are the whole.

    Every rank has a part of every expert, as of the MLP of a layer without experts, and not some experts whole: so each
    has the same work, whichever experts a step's tokens take, and the results are added up once either way.

    Attributes:
        expert: of the intermediate features of each expert. shared: of those of the experts that compute every token.
    """

    tp: int
    rank: int
    kv_heads: range
    heads: range
    intermediate: range
    vocab: range
    expert: range
    shared: range

    @property
    def expert_width(self) -> int:
        """Intermediate features of an expert as they are stored: zeros fill the last panel of gate and up."""
        return -(-len(self.expert) // (PANEL_ROWS // 2)) * (PANEL_ROWS // 2)


def split(total: int, parts: int, part: int, multiple: int) -> range:
    """The part of `range(total)` of one of `parts`, as even as boundaries at multiples of `multiple` allow.

    Where there are fewer multiples than parts, boundaries are multiples of a smaller power of two.
    """
    while multiple > 1 and -(-total // multiple) < parts:
        multiple //= 2
    units = -(-total // multiple)
    each, more = divmod(units, parts)
    first = part * each + min(part, more)
    last = first + each + (part < more)
    return range(min(first * multiple, total), min(last * multiple, total))


def shard_of(config: ModelConfig, tp: int, rank: int) -> Shard:
    """The shard of rank `rank` of `tp`. Key-value heads are not divided; query heads follow theirs.

    Raises:
        StartFailure: there are more ranks than key-value heads.
    """
    if not 1 <= tp <= config.num_kv_heads:
        raise StartFailure(
            f"tp = {tp} is not possible, for the model has {config.num_kv_heads} key-value heads: set tp to 1"
            + (f" … {config.num_kv_heads}" if config.num_kv_heads > 1 else "")
        )
    if config.transformers is not None and tp > 1:
        raise StartFailure(f"{config.architecture} is run by transformers' implementation, on one rank: set tp to 1")
    if not 0 <= rank < tp:
        raise StartFailure(f"rank {rank} does not exist in a group of {tp}")
    kv_heads = split(config.num_kv_heads, tp, rank, 1)
    group = config.num_heads // config.num_kv_heads
    experts = config.experts
    return Shard(
        tp=tp,
        rank=rank,
        kv_heads=kv_heads,
        heads=range(kv_heads.start * group, kv_heads.stop * group),
        intermediate=split(config.intermediate_size, tp, rank, 32),
        vocab=split(config.vocab_size, tp, rank, PANEL_ROWS),
        expert=split(experts.intermediate_size, tp, rank, 32) if experts else range(0),
        shared=split(experts.shared_size, tp, rank, 32) if experts else range(0),
    )


def kv_format(config: ModelConfig, dtype: KVDType, page_size: int, tp: int, rank: int) -> KVFormat:
    """The pages of one rank. Raises StartFailure as `shard_of` does, and for a type that the pages cannot have."""
    kv_heads = len(shard_of(config, tp, rank).kv_heads)
    if config.latent is None:
        return KVFormat(config.num_layers, page_size, kv_heads, config.head_dim, dtype)
    if dtype == "int8":
        raise StartFailure('int8 is not possible with latent attention: set kv_dtype to "bfloat16" or "auto"')
    width = config.latent.kv_rank + config.latent.rope_dim
    return KVFormat(config.num_layers, page_size, 1, width, dtype, "mla")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's place in a weights arena.

    A matrix [N, K] is stored as it is, or, `packed`, as a `kernels.PackedWeight` of its dtype is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: WeightDType
    packed: bool
    offset: int

    @property
    def stored_dtype(self) -> str:
        """Torch's name of the type of the stored numbers; packed integers are bytes."""
        return "uint8" if self.dtype in ("int8", "int4") else self.dtype

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor: `kernels.packed_shape` if it is packed."""
        if not self.packed:
            return self.shape
        rows, columns = self.shape
        panels = -(-rows // PANEL_ROWS)
        if self.dtype == "int4":
            return (panels * (columns // GROUP) * PANEL_ROWS * (GROUP // 2 + 2 * 2),)
        if self.dtype == "int8":
            return (panels * -(-columns // GROUP) * PANEL_ROWS * (GROUP + 2),)
        return (panels, columns, PANEL_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return math.prod(self.stored_shape) * _ITEM_BYTES[self.stored_dtype]


def layer_shapes(config: ModelConfig, shard: Shard, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer's tensors; those of two dimensions are matrices [outputs, inputs]."""
    hidden = config.hidden_size
    yield "attention_norm", (hidden,)
    yield from (
        _attention_shapes(config, shard) if config.latent is None else _latent_shapes(config, config.latent, shard)
    )
    if config.attention_out_bias:
        yield "o_bias", (hidden,)
    yield "mlp_norm", (hidden,)
    if config.experts is not None and layer in config.experts.layers:
        yield from _expert_shapes(hidden, config.experts, shard)
        return
    intermediate = len(shard.intermediate)
    yield "gate_up", (2 * intermediate, hidden)
    if config.mlp_bias:
        yield "gate_up_bias", (2 * intermediate,)
    yield "down", (hidden, intermediate)
    if config.mlp_bias:
        yield "down_bias", (hidden,)


def _attention_shapes(config: ModelConfig, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = len(shard.heads), len(shard.kv_heads)
    yield "qkv", ((heads + 2 * kv_heads) * dim, hidden)
    if config.qkv_bias:
        yield "qkv_bias", ((heads + 2 * kv_heads) * dim,)
    if config.qk_norm:
        yield "q_norm", (dim,)
        yield "k_norm", (dim,)
    yield "o", (hidden, heads * dim)


def _latent_shapes(config: ModelConfig, latent: Latent, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`qkv` makes what queries are expanded from, or the queries themselves, and the latent with its rotated key."""
    hidden, heads = config.hidden_size, len(shard.heads)
    queries = heads * config.head_dim
    rows = (queries if latent.q_rank is None else latent.q_rank) + latent.kv_rank + latent.rope_dim
    yield "qkv", (rows, hidden)
    if config.qkv_bias:
        yield "qkv_bias", (rows,)
    if latent.q_rank is not None:
        yield "q_norm", (latent.q_rank,)
        yield "q", (queries, latent.q_rank)
    yield "kv_norm", (latent.kv_rank,)
    yield "k_absorb", (heads * latent.kv_rank, latent.nope_dim)
    yield "v_up", (heads * latent.value_dim, latent.kv_rank)
    yield "o", (hidden, heads * latent.value_dim)


def _expert_shapes(hidden: int, experts: Experts, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The experts' matrices lie one below the other, each a run of whole panels."""
    yield "router", (experts.count, hidden)
    if experts.bias:
        yield "router_bias", (experts.count,)
    yield "experts_gate_up", (experts.count * 2 * shard.expert_width, hidden)
    yield "experts_down", (experts.count * hidden, shard.expert_width)
    if experts.shared_size:
        yield "shared_gate_up", (2 * len(shard.shared), hidden)
        yield "shared_down", (hidden, len(shard.shared))


def weight_layout(config: ModelConfig, dtype: WeightDType, shard: Shard, packed: bool) -> tuple[list[TensorSpec], int]:
    """The places of all tensors of a shard, behind a header of HEADER_BYTES, and the bytes of the whole.

    The same for every incarnation of a rank: nothing but the arguments decides. The embedding is whole on every rank.
    Rows of an output layer that shares the embedding are not stored again unless the embedding is a plain table and
    the output layer is not, or a shard's rows do not begin where a panel of the embedding does.

    Args:
        packed: store matrices of floats as panels; those of integers always are.
    """
    value_dim = config.latent.value_dim if config.latent else config.head_dim
    first = {
        "o": shard.heads.start * value_dim,
        "down": shard.intermediate.start,
        "shared_down": shard.shared.start,
    }
    specs: list[TensorSpec] = []
    offset = HEADER_BYTES
    for name, shape in _model_shapes(config, shard):
        kind = name.rpartition(".")[2]
        stored: WeightDType = "float32" if kind == "router_bias" else compute_dtype(dtype)
        in_panels = False
        if len(shape) == 2:
            stored = matrix_dtype(config, dtype, name, first.get(kind, 0), shape[1])
            in_panels = stored in ("int8", "int4") or (packed and kind != "embedding" and kind not in FLOATS)
        if name == "lm_head" and config.tie_embeddings and _shares_embedding(specs[0], in_panels, shard.vocab):
            continue
        specs.append(TensorSpec(name, shape, stored, in_panels, offset))
        offset += -(-specs[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return specs, offset


def _model_shapes(config: ModelConfig, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors; see `layer_shapes`."""
    yield "embedding", (config.vocab_size, config.hidden_size)
    yield "final_norm", (config.hidden_size,)
    yield "lm_head", (len(shard.vocab), config.hidden_size)
    for layer in range(config.num_layers):
        yield from ((f"{layer}.{name}", shape) for name, shape in layer_shapes(config, shard, layer))


def _shares_embedding(embedding: TensorSpec, in_panels: bool, rows: range) -> bool:
    """Whether an output layer of these rows of the embedding is a part of it as it is stored."""
    if not embedding.packed:
        return not in_panels
    return rows.start % PANEL_ROWS == 0 and (rows.stop % PANEL_ROWS == 0 or rows.stop == embedding.shape[0])


def weight_bytes(config: ModelConfig, dtype: WeightDType, tp: int, rank: int) -> int:
    """Bytes that the weights arena of a rank needs, whichever way its matrices of floats are stored.

    Raises StartFailure as `shard_of` does, and for a type that the model cannot be loaded as.
    """
    shard = shard_of(config, tp, rank)
    if config.transformers is not None:
        if dtype not in ("float32", "bfloat16"):
            whose = f"{config.architecture} is run by transformers' implementation"
            raise StartFailure(f'{whose}, which has no {dtype}: set model.dtype to "bfloat16"')
        shape = config.transformers
        return HEADER_BYTES + shape.parameters * _ITEM_BYTES[dtype] + shape.tensors * ALIGNMENT
    return max(weight_layout(config, dtype, shard, packed)[1] for packed in (False, True))


def kv_bytes_per_token(config: ModelConfig, dtype: KVDType, kv_heads: int) -> int:
    """Bytes of keys and values of one token, in all layers, on a rank with `kv_heads` key-value heads."""
    if config.latent is not None:
        return kv_format(config, dtype, 1, 1, 0).token_bytes
    return KVFormat(config.num_layers, 1, kv_heads, config.head_dim, dtype).token_bytes
