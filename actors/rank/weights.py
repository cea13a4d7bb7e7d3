"""A shard's weights in an arena: packed once by the first incarnation of a rank, mapped by the next."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

import kernels
from actors.actor import StartFailure
from actors.checkpoint import ModelConfig, checkpoint_identity
from actors.dtypes import WeightDType
from actors.rank.parts import Part, parts_of
from actors.rank.shard import HEADER_BYTES, PANEL_ROWS, Shard, Slot, weight_layout
from actors.rank.source import Source, open_source
from transport import Arena

logger = logging.getLogger(__name__)

Matrix = Tensor | kernels.PackedWeight

LAYOUT_VERSION = 2
TASK_ROWS = 8192
"""Rows of a tall matrix that are read and packed at a time: whole panels."""
_MAGIC = b"weights\0"
_HEADER = struct.Struct("<8sQI")  # magic, state, bytes of the contents' description that follows
_EMPTY, _PACKING, _READY = 0, 1, 2


class Identity(msgspec.Struct, frozen=True):
    """What the weights in an arena are. All but the file's state must be what a rank expects."""

    version: int
    path: str
    dtype: str
    tp: int
    rank: int
    packed: bool
    files: list[tuple[str, int, int]]
    """Name, bytes and time of change (ns) of each of the checkpoint's files."""


class Contents(msgspec.Struct, frozen=True):
    """What stands in front of the weights in an arena, so that a restarted rank need not open the checkpoint.

    `checkpoint` is `checkpoint_identity` of the files that the weights were read from.
    """

    identity: Identity
    config: ModelConfig
    checkpoint: str


@dataclass(frozen=True)
class AttentionWeights:
    """Attention of one layer; `qkv` is queries, keys and values one after the other."""

    qkv: Matrix
    o: Matrix
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class LatentWeights:
    """Latent attention of one layer.

    `qkv` makes the vector that queries are expanded from, or, where there is no `q`, the queries themselves, and then
    the latent vector and its key to be rotated. k_absorb: [heads * kv_rank, nope_dim], v_up: [heads * value_dim,
    kv_rank], what takes a head's query into the space of latents, and a latent to the head's value.
    """

    qkv: Matrix
    kv_norm: Tensor
    k_absorb: Tensor
    v_up: Tensor
    o: Matrix
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q: Matrix | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class MLPWeights:
    """A gated MLP; `gate_up` is the gate's rows and then those of up."""

    gate_up: Matrix
    down: Matrix
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """The mixture of experts of one layer: matrices as `kernels.experts` takes them, the experts one below the
    other."""

    router: Matrix
    gate_up: Matrix
    down: Matrix
    router_bias: Tensor | None
    shared: MLPWeights | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer; see `actors.rank.shard.layer_shapes`."""

    attention_norm: Tensor
    attention: AttentionWeights | LatentWeights
    mlp_norm: Tensor
    mlp: MLPWeights | ExpertWeights


@dataclass(frozen=True)
class Weights:
    """A shard's weights. They use an arena's memory and keep it mapped."""

    embedding: Matrix
    final_norm: Tensor
    lm_head: Matrix
    layers: list[LayerWeights]
    nbytes: int

    @property
    def packed(self) -> list[kernels.PackedWeight]:
        """The matrices that `kernels.linear` takes packed, but for the experts'."""
        matrices: list[Matrix | None] = [self.lm_head]
        for layer in self.layers:
            matrices += [layer.attention.qkv, layer.attention.o]
            matrices += [layer.attention.q] if isinstance(layer.attention, LatentWeights) else []
            mlp = layer.mlp.shared if isinstance(layer.mlp, ExpertWeights) else layer.mlp
            matrices += [mlp.gate_up, mlp.down] if mlp else []
        return [matrix for matrix in matrices if isinstance(matrix, kernels.PackedWeight)]


def load_weights(
    path: Path,
    config: ModelConfig,
    dtype: WeightDType,
    shard: Shard,
    packed: bool,
    descriptor: int,
    device: torch.device | str = "cpu",
) -> Weights:
    """The weights of a shard, from an arena if a former incarnation has packed them there, else from the checkpoint.

    An incarnation that was killed while it packed leaves a mark, and the next packs again.

    Args:
        packed: store matrices of floats as panels for `kernels.linear`.
        descriptor: of the arena, of at least `weight_bytes` bytes.

    Raises:
        StartFailure: the arena is too small or holds other weights.
        CheckpointError: the checkpoint is damaged.
    """
    slots, size = weight_layout(config, dtype, shard, packed)
    identity = Identity(
        LAYOUT_VERSION, str(path), dtype, shard.tp, shard.rank, packed, [_state(file) for file in _files(path)]
    )
    arena_bytes = os.fstat(descriptor).st_size
    if arena_bytes < size:
        raise StartFailure(f"the weights arena has {arena_bytes} bytes and {size} are needed: restart the engine")
    found = contents_of(descriptor)
    if found is None:
        contents = Contents(identity, config, checkpoint_identity(path, config))
        _pack(descriptor, open_source(path, config), contents, shard, slots)
    else:
        _compare(found.identity, identity)
    arena = Arena(descriptor, private=True)
    if not arena.sealed:
        arena.seal()
    views = {slot.name: _view(arena, slot).to(device) for slot in slots}
    return _collect(views, slots, config, shard)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _state(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except FileNotFoundError:  # has been removed since the weights were packed, or the source will say so
        return file.name, 0, 0
    return file.name, stat.st_size, stat.st_mtime_ns


def contents_of(descriptor: int) -> Contents | None:
    """What an arena holds; None if it is empty or its packing was not finished.

    Raises StartFailure if it is sealed and holds nothing that can be used.
    """
    header = os.pread(descriptor, HEADER_BYTES, 0)
    magic, state, length = _HEADER.unpack_from(header) if len(header) >= _HEADER.size else (b"", _EMPTY, 0)
    if magic == _MAGIC and state == _READY:
        try:
            return msgspec.json.decode(header[_HEADER.size : _HEADER.size + length], type=Contents)
        except msgspec.MsgspecError:
            pass
    if Arena(descriptor, private=True).sealed:
        raise StartFailure("the weights arena is sealed but holds no weights: restart the engine")
    return None


def _compare(found: Identity, wanted: Identity) -> None:
    if msgspec.structs.replace(found, files=wanted.files) != wanted:
        raise StartFailure(f"the weights arena holds {found}, not {wanted}: restart the engine")
    if found.files != wanted.files:
        logger.warning("the checkpoint's files have changed; going on with the weights that this engine started with")


def _pack(descriptor: int, source: Source, contents: Contents, shard: Shard, slots: list[Slot]) -> None:
    started = time.perf_counter()
    arena = Arena(descriptor)
    if _HEADER.unpack_from(arena.buffer)[:2] == (_MAGIC, _PACKING):
        logger.warning("a former incarnation was killed while it packed the weights; packing them again")
    encoded = msgspec.json.encode(contents)
    if _HEADER.size + len(encoded) > HEADER_BYTES:
        raise StartFailure(f"{contents.identity.path}: its description does not fit into {HEADER_BYTES} bytes")
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _PACKING, len(encoded))
    arena.buffer[_HEADER.size : _HEADER.size + len(encoded)] = encoded

    def fill(task: tuple[Slot, Tensor, list[Part]]) -> None:
        _fill(*task, source)

    tasks = [
        task for slot in slots for task in _tasks(slot, _view(arena, slot), parts_of(contents.config, shard, slot.name))
    ]
    # Tensors side by side on threads of their own: torch's would meet at a barrier a hundred times a tensor.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, tasks):
                pass
    finally:
        torch.set_num_threads(threads)
    del tasks
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _READY, len(encoded))
    arena.close()
    logger.info("packed the weights in %.2f s", time.perf_counter() - started)


def _view(arena: Arena, slot: Slot) -> Tensor:
    count = math.prod(slot.stored_shape)
    flat = torch.frombuffer(arena.buffer, dtype=getattr(torch, slot.stored_dtype), count=count, offset=slot.offset)
    return flat.view(slot.stored_shape)


def _rows_of(slot: Slot, view: Tensor, first: int, count: int) -> Tensor:
    """Rows of a matrix as they are stored; of a packed one, the panels that they are in."""
    if not slot.packed:
        return view[first : first + count]
    panels = slice(first // PANEL_ROWS, -(-(first + count) // PANEL_ROWS))
    if view.dim() == 1:
        return view.view(-(-slot.shape[0] // PANEL_ROWS), -1)[panels].flatten()
    return view[panels]


def _tasks(slot: Slot, view: Tensor, parts: list[Part]) -> Iterator[tuple[Slot, Tensor, list[Part]]]:
    """A tensor as pieces of work, cut where panels begin: tall matrices and single experts. Less memory in use at a
    time, and all threads have some."""
    if len(slot.shape) == 1 or not parts:
        yield slot, view, parts
        return
    first = row = 0
    held: list[Part] = []

    def piece() -> tuple[Slot, Tensor, list[Part]]:
        rows = row - first
        return dataclasses.replace(slot, shape=(rows, slot.shape[1])), _rows_of(slot, view, first, rows), held

    for part in parts:
        for each in _cut(part):
            held.append(each)
            row += each.height
            if row % PANEL_ROWS == 0:
                yield piece()
                first, held = row, []
    if held:
        yield piece()


def _cut(part: Part) -> Iterator[Part]:
    """A tall part as several."""
    if part.transposed or part.padded is not None:
        yield part
        return
    for start in range(0, len(part.rows), TASK_ROWS):
        yield dataclasses.replace(part, rows=part.rows[start : start + TASK_ROWS])


def _fill(slot: Slot, view: Tensor, parts: list[Part], source: Source) -> None:
    """Writes a tensor's parts, one below the other; zeros if there are none."""
    if not parts:
        view.zero_()
    elif not slot.packed:
        row = 0
        for part in parts:
            values = part.read(source)
            view[row : row + len(values)].copy_(values)
            row += len(values)
    elif slot.dtype == "int4" and (groups := _four_bits(source, parts)):
        kernels.pack_int4(*groups, view)
    else:
        kernels.pack_weight(_joined([part.read(source) for part in parts]), view, slot.dtype)


def _four_bits(source: Source, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Quants, scales and minimums of a matrix that the checkpoint has in groups of 4 bits, else None."""
    found = []
    for part in parts:
        groups = part.read_four_bits(source)
        if groups is None:
            return None
        found.append(groups)
    quants, scales, minimums = (_joined(list(each)) for each in zip(*found, strict=True))
    return quants, scales, minimums


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _collect(views: dict[str, Tensor], slots: list[Slot], config: ModelConfig, shard: Shard) -> Weights:
    named: dict[str, Matrix] = {
        slot.name: kernels.PackedWeight(views[slot.name], slot.dtype, *slot.shape) if slot.packed else views[slot.name]
        for slot in slots
    }
    layers: list[dict[str, Matrix]] = [{} for _ in range(config.num_layers)]
    for name, value in named.items():
        layer, _, kind = name.partition(".")
        if kind:
            layers[int(layer)][kind] = value
    if "lm_head" not in named:  # rows of the embedding
        table = slots[0]
        rows = _rows_of(table, views["embedding"], shard.vocab.start, len(shard.vocab))
        named["lm_head"] = (
            kernels.PackedWeight(rows, table.dtype, len(shard.vocab), config.hidden_size) if table.packed else rows
        )
    return Weights(
        embedding=named["embedding"],
        final_norm=views["final_norm"],
        lm_head=named["lm_head"],
        layers=[_layer(layer, config) for layer in layers],
        nbytes=sum(view.nbytes for view in views.values()),
    )


def _layer(named: dict[str, Any], config: ModelConfig) -> LayerWeights:
    """One layer of the tensors that `layer_shapes` names."""

    def these(kind: Any, prefix: str = "") -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: named[prefix + name] for name in names if prefix + name in named})

    mlp: MLPWeights | ExpertWeights
    if "router" in named:
        mlp = ExpertWeights(
            router=named["router"],
            gate_up=named["experts_gate_up"],
            down=named["experts_down"],
            router_bias=named.get("router_bias"),
            shared=these(MLPWeights, "shared_") if "shared_gate_up" in named else None,
        )
    else:
        mlp = these(MLPWeights)
    return LayerWeights(
        attention_norm=named["attention_norm"],
        attention=these(AttentionWeights if config.latent is None else LatentWeights),
        mlp_norm=named["mlp_norm"],
        mlp=mlp,
    )
