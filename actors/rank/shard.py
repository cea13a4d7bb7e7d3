"""Which part of a model one tensor-parallel rank holds, and where it lies in its weights arena. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from actors.actor import StartFailure
from actors.checkpoint import ModelConfig
from actors.kv_format import ITEM_BYTES, DType, KVDType, KVFormat

ALIGNMENT = 64
HEADER_BYTES = 4096
PANEL_ROWS = 64
"""Rows of a panel of `kernels.PackedWeight`."""


@dataclass(frozen=True)
class Shard:
    """Contiguous ranges of a model's parts. The ranges of all ranks, one after the other, are the whole."""

    tp: int
    rank: int
    kv_heads: range
    heads: range
    intermediate: range
    vocab: range


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
    if not 0 <= rank < tp:
        raise StartFailure(f"rank {rank} does not exist in a group of {tp}")
    kv_heads = split(config.num_kv_heads, tp, rank, 1)
    group = config.num_heads // config.num_kv_heads
    return Shard(
        tp=tp,
        rank=rank,
        kv_heads=kv_heads,
        heads=range(kv_heads.start * group, kv_heads.stop * group),
        intermediate=split(config.intermediate_size, tp, rank, 32),
        vocab=split(config.vocab_size, tp, rank, PANEL_ROWS),
    )


def kv_format(config: ModelConfig, dtype: KVDType, page_size: int, tp: int, rank: int) -> KVFormat:
    """The pages of one rank. Raises StartFailure as `shard_of` does."""
    return KVFormat(
        layers=config.num_layers,
        page_size=page_size,
        kv_heads=len(shard_of(config, tp, rank).kv_heads),
        head_dim=config.head_dim,
        dtype=dtype,
    )


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a weights arena.

    A matrix [N, K] is stored as it is, or, `packed`, as panels [ceil(N / 64), K, 64].
    """

    name: str
    shape: tuple[int, ...]
    packed: bool
    offset: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if not self.packed:
            return self.shape
        rows, columns = self.shape
        return (-(-rows // PANEL_ROWS), columns, PANEL_ROWS)


def layer_shapes(config: ModelConfig, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer's tensors; those of two dimensions are matrices [outputs, inputs]."""
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads, intermediate = len(shard.heads), len(shard.kv_heads), len(shard.intermediate)
    yield "attention_norm", (hidden,)
    yield "qkv", ((heads + 2 * kv_heads) * dim, hidden)
    if config.qkv_bias:
        yield "qkv_bias", ((heads + 2 * kv_heads) * dim,)
    if config.qk_norm:
        yield "q_norm", (dim,)
        yield "k_norm", (dim,)
    yield "o", (hidden, heads * dim)
    if config.attention_out_bias:
        yield "o_bias", (hidden,)
    yield "mlp_norm", (hidden,)
    yield "gate_up", (2 * intermediate, hidden)
    if config.mlp_bias:
        yield "gate_up_bias", (2 * intermediate,)
    yield "down", (hidden, intermediate)
    if config.mlp_bias:
        yield "down_bias", (hidden,)


def weight_layout(config: ModelConfig, dtype: DType, shard: Shard, packed: bool) -> tuple[list[Slot], int]:
    """The places of all tensors of a shard, behind a header of HEADER_BYTES, and the bytes of the whole.

    The embedding is whole on every rank. Rows of an output layer that shares the embedding are not stored again unless
    `packed`.
    """
    shapes = [("embedding", (config.vocab_size, config.hidden_size)), ("final_norm", (config.hidden_size,))]
    if packed or not config.tie_embeddings:
        shapes.append(("lm_head", (len(shard.vocab), config.hidden_size)))
    named: list[tuple[str, tuple[int, ...]]] = [*shapes]
    for layer in range(config.num_layers):
        named.extend((f"{layer}.{name}", shape) for name, shape in layer_shapes(config, shard))
    slots, offset = [], HEADER_BYTES
    for name, shape in named:
        slot = Slot(name, shape, packed and len(shape) == 2 and name != "embedding", offset)
        slots.append(slot)
        size = math.prod(slot.stored_shape) * ITEM_BYTES[dtype]
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return slots, offset


def weight_bytes(config: ModelConfig, dtype: DType, tp: int, rank: int) -> int:
    """Bytes that the weights arena of a rank needs, whichever way its matrices are stored.

    Raises StartFailure as `shard_of` does.
    """
    shard = shard_of(config, tp, rank)
    return max(weight_layout(config, dtype, shard, packed)[1] for packed in (False, True))


def kv_bytes_per_token(config: ModelConfig, dtype: KVDType, kv_heads: int) -> int:
    """Bytes of keys and values of one token, in all layers, on a rank with `kv_heads` key-value heads."""
    return KVFormat(config.num_layers, 1, kv_heads, config.head_dim, dtype).token_bytes
