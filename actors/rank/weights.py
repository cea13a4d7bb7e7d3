"""A shard's weights in an arena: packed once by the first incarnation of a rank, mapped by the next."""

from __future__ import annotations

import logging
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

import kernels
from actors.actor import StartFailure
from actors.checkpoint import ModelConfig
from actors.kv_format import DType
from actors.rank.shard import HEADER_BYTES, Shard, Slot, weight_layout
from actors.rank.source import Source, open_source
from transport import Arena

logger = logging.getLogger(__name__)

Matrix = Tensor | kernels.PackedWeight

LAYOUT_VERSION = 1
_MAGIC = b"weights\0"
_HEADER = struct.Struct("<8sQI")  # magic, state, bytes of the identity that follows
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


@dataclass(frozen=True)
class LayerWeights:
    """One layer; see `actors.rank.shard.layer_shapes`. `qkv` is queries, keys and values one after the other, `gate_up`
    likewise."""

    attention_norm: Tensor
    qkv: Matrix
    o: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """A shard's weights. They use an arena's memory and keep it mapped."""

    embedding: Tensor
    final_norm: Tensor
    lm_head: Matrix
    layers: list[LayerWeights]
    nbytes: int


def load_weights(
    path: Path,
    config: ModelConfig,
    dtype: DType,
    shard: Shard,
    packed: bool,
    descriptor: int,
    device: torch.device | str = "cpu",
) -> Weights:
    """The weights of a shard, from an arena if a former incarnation has packed them there, else from the checkpoint.

    An incarnation that was killed while it packed leaves a mark, and the next packs again.

    Args:
        packed: store matrices as panels for `kernels.linear`.
        descriptor: of the arena, of at least `weight_bytes` bytes.

    Raises:
        StartFailure: the arena is too small or holds other weights.
        CheckpointError: the checkpoint is damaged.
    """
    slots, size = weight_layout(config, dtype, shard, packed)
    identity = Identity(
        LAYOUT_VERSION, str(path), dtype, shard.tp, shard.rank, packed, [_state(file) for file in _files(path)]
    )
    arena = Arena(descriptor, private=True)
    if arena.size < size:
        raise StartFailure(f"the weights arena has {arena.size} bytes and {size} are needed: restart the engine")
    found = _ready_identity(arena)
    if found is None:
        arena.close()
        _pack(descriptor, open_source(path, config), config, dtype, shard, slots, identity)
        arena = Arena(descriptor, private=True)
    else:
        _compare(found, identity)
    if not arena.sealed:
        arena.seal()
    views = {slot.name: _view(arena, slot, dtype).to(device) for slot in slots}
    return _collect(views, slots, config, dtype, shard)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _state(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _ready_identity(arena: Arena) -> Identity | None:
    """What the arena holds, or None if it is empty or its packing was not finished."""
    magic, state, length = _HEADER.unpack_from(arena.buffer)
    if magic != _MAGIC or state != _READY:
        if arena.sealed:
            raise StartFailure("the weights arena is sealed but holds no weights: restart the engine")
        if state == _PACKING:
            logger.warning("a former incarnation was killed while it packed the weights; packing them again")
        return None
    try:
        return msgspec.json.decode(arena.buffer[_HEADER.size : _HEADER.size + length], type=Identity)
    except msgspec.MsgspecError:
        return None


def _compare(found: Identity, wanted: Identity) -> None:
    if msgspec.structs.replace(found, files=wanted.files) != wanted:
        raise StartFailure(f"the weights arena holds {found}, not {wanted}: restart the engine")
    if found.files != wanted.files:
        logger.warning("the checkpoint's files have changed; going on with the weights that this engine started with")


def _pack(
    descriptor: int,
    source: Source,
    config: ModelConfig,
    dtype: DType,
    shard: Shard,
    slots: list[Slot],
    identity: Identity,
) -> None:
    started = time.perf_counter()
    arena = Arena(descriptor)
    encoded = msgspec.json.encode(identity)
    if _HEADER.size + len(encoded) > HEADER_BYTES:
        encoded = msgspec.json.encode(msgspec.structs.replace(identity, files=[]))
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _PACKING, len(encoded))
    arena.buffer[_HEADER.size : _HEADER.size + len(encoded)] = encoded

    def fill(slot: Slot) -> None:
        _fill(_view(arena, slot, dtype), slot, dtype, _parts(source, config, shard, slot.name))

    # Tensors side by side on threads of their own: torch's would meet at a barrier a hundred times a tensor.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, slots):
                pass
    finally:
        torch.set_num_threads(threads)
    _HEADER.pack_into(arena.buffer, 0, _MAGIC, _READY, len(encoded))
    arena.close()
    logger.info("packed the weights in %.2f s", time.perf_counter() - started)


def _view(arena: Arena, slot: Slot, dtype: DType) -> Tensor:
    count = 1
    for length in slot.stored_shape:
        count *= length
    flat = torch.frombuffer(arena.buffer, dtype=getattr(torch, dtype), count=count, offset=slot.offset)
    return flat.view(slot.stored_shape)


def _fill(view: Tensor, slot: Slot, dtype: DType, parts: list[Tensor]) -> None:
    """Writes a tensor's parts, one below the other."""
    if slot.packed:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        kernels.pack_weight(whole, view, dtype)
        return
    row = 0
    for part in parts:
        view[row : row + len(part)].copy_(part)
        row += len(part)


def _parts(source: Source, config: ModelConfig, shard: Shard, name: str) -> list[Tensor]:
    """What the tensor `name` of a shard is put together from."""
    hidden, dim = config.hidden_size, config.head_dim
    everything = range(hidden)
    queries = range(shard.heads.start * dim, shard.heads.stop * dim)
    keys = range(shard.kv_heads.start * dim, shard.kv_heads.stop * dim)
    inner = shard.intermediate

    def matrix(module: str, outputs: int, inputs: int, rows: range, columns: range) -> Tensor:
        return source.read(f"{module}.weight", (outputs, inputs), rows, columns)

    def vector(tensor: str, length: int, part: range) -> Tensor:
        return source.read(tensor, (length,), range(1), part)

    if name == "embedding":
        return [matrix("model.embed_tokens", config.vocab_size, hidden, range(config.vocab_size), everything)]
    if name == "lm_head":
        module = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        return [matrix(module, config.vocab_size, hidden, shard.vocab, everything)]
    if name == "final_norm":
        return [vector("model.norm.weight", hidden, everything)]

    layer, _, kind = name.partition(".")
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    all_queries, all_keys = config.num_heads * dim, config.num_kv_heads * dim
    projections = [
        (attention + "q_proj", all_queries, queries),
        (attention + "k_proj", all_keys, keys),
        (attention + "v_proj", all_keys, keys),
    ]
    gates = [(mlp + "gate_proj", config.intermediate_size, inner), (mlp + "up_proj", config.intermediate_size, inner)]
    match kind:
        case "qkv":
            return [matrix(module, outputs, hidden, rows, everything) for module, outputs, rows in projections]
        case "qkv_bias":
            return [vector(f"{module}.bias", outputs, rows) for module, outputs, rows in projections]
        case "gate_up":
            return [matrix(module, outputs, hidden, rows, everything) for module, outputs, rows in gates]
        case "gate_up_bias":
            return [vector(f"{module}.bias", outputs, rows) for module, outputs, rows in gates]
        case "o":
            return [matrix(attention + "o_proj", hidden, all_queries, everything, queries)]
        case "down":
            return [matrix(mlp + "down_proj", hidden, config.intermediate_size, everything, inner)]
        case "o_bias" | "down_bias":
            # The ranks' results are added up, so one of them adds the bias.
            if shard.rank:
                return [torch.zeros(hidden)]
            module = attention + "o_proj" if kind == "o_bias" else mlp + "down_proj"
            return [vector(f"{module}.bias", hidden, everything)]
        case "q_norm" | "k_norm":
            return [vector(f"{attention}{kind}.weight", dim, range(dim))]
        case "attention_norm":
            return [vector(prefix + "input_layernorm.weight", hidden, everything)]
        case "mlp_norm":
            return [vector(prefix + "post_attention_layernorm.weight", hidden, everything)]
    raise AssertionError(name)


def _collect(views: dict[str, Tensor], slots: list[Slot], config: ModelConfig, dtype: DType, shard: Shard) -> Weights:
    named: dict[str, Matrix] = {
        slot.name: kernels.PackedWeight(views[slot.name], dtype, *slot.shape) if slot.packed else views[slot.name]
        for slot in slots
    }
    layers: list[dict[str, Matrix]] = [{} for _ in range(config.num_layers)]
    for name, value in named.items():
        layer, _, kind = name.partition(".")
        if kind:
            layers[int(layer)][kind] = value
    embedding = views["embedding"]
    return Weights(
        embedding=embedding,
        final_norm=views["final_norm"],
        lm_head=named.get("lm_head", embedding[shard.vocab.start : shard.vocab.stop]),
        layers=[LayerWeights(**layer) for layer in layers],  # type: ignore[arg-type]
        nbytes=sum(view.nbytes for view in views.values()),
    )
