"""A shard's weights in an arena: packed once by the first incarnation of a rank, mapped by the next."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.checkpoint import CheckpointError, ModelConfig, checkpoint_identity
from llm_runtime.actors.dtypes import WeightDType
from llm_runtime.actors.rank.checkpoint_mapping import Part, parts_of
from llm_runtime.actors.rank.checkpoint_reader import CheckpointReader, open_checkpoint
from llm_runtime.actors.rank.shard import PANEL_ROWS, Shard, TensorSpec, weight_layout
from llm_runtime.actors.rank.weights_arena import (
    Contents,
    check_room,
    compare_identities,
    contents_of,
    identity_of,
    packing,
    sealed_arena,
)
from llm_runtime.transport import Arena

logger = logging.getLogger(__name__)

Matrix = Tensor | kernels.PackedWeight

TASK_ROWS = 8192
"""Rows of a tall matrix that are read and packed at a time: whole panels."""


_WITH_NEXT_TOKEN_LAYER = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
"""Architectures whose checkpoints have a layer more, for guesses, which is not used here."""
_WITHOUT_EFFECT = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".kv_scale", ".attn_rot_embd.weight")
"""Ends of names of tensors that follow from the configuration, or are for cached numbers of another type."""


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

    count: int
    router: Matrix
    gate_up: Matrix
    down: Matrix
    router_bias: Tensor | None
    shared: MLPWeights | None

    def singly(self) -> Iterator[Matrix]:
        """The packed matrices of the single experts."""
        for matrix in (self.gate_up, self.down):
            if isinstance(matrix, kernels.PackedWeight):
                rows = matrix.out_features // self.count
                yield from (matrix.rows(expert * rows, rows) for expert in range(self.count))


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
        """The matrices that `kernels.linear` takes packed, each expert's by itself."""
        matrices: list[Matrix | None] = [self.lm_head]
        for layer in self.layers:
            matrices += [layer.attention.qkv, layer.attention.o]
            matrices += [layer.attention.q] if isinstance(layer.attention, LatentWeights) else []
            if isinstance(layer.mlp, ExpertWeights):
                matrices += layer.mlp.singly()
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
    check_head: bool = True,
) -> Weights:
    """The weights of a shard, from an arena if a former incarnation has packed them there, else from the checkpoint.

    An incarnation that was killed while it packed leaves a mark, and the next packs again.

    Args:
        packed: store matrices of floats as panels for `kernels.linear`.
        descriptor: of the arena, of at least `weight_bytes` bytes.
        check_head: refuse a checkpoint whose head is another than its configuration says. Of no use to who computes no
            logits, and takes the head for the embedding whatever the configuration says.

    Raises:
        StartFailure: the arena is too small or holds other weights.
        CheckpointError: the checkpoint is damaged.
    """
    specs, size = weight_layout(config, dtype, shard, packed)
    identity = identity_of(path, dtype, shard.tp, shard.rank, packed)
    check_room(descriptor, size)
    found = contents_of(descriptor)
    if found is None:
        contents = Contents(identity, config, checkpoint_identity(path, config))
        with packing(descriptor, contents) as arena:
            source = open_checkpoint(path, config)
            if check_head and not shard.rank:
                _check_head(config, source)
            _pack(arena, source, config, shard, specs)
    else:
        compare_identities(found.identity, identity)
    arena = sealed_arena(descriptor)
    views = {spec.name: _view(arena, spec).to(device) for spec in specs}
    return _collect(views, specs, config, shard)


def _pack(arena: Arena, source: CheckpointReader, config: ModelConfig, shard: Shard, specs: list[TensorSpec]) -> None:
    def fill(task: tuple[TensorSpec, Tensor, list[Part]]) -> None:
        _fill(*task, source)

    parts = {spec.name: parts_of(config, shard, spec.name) for spec in specs}
    if not shard.rank:  # it has a part of every tensor
        _check_names(config, source, {part.name for each in parts.values() for part in each})
    tasks = [task for spec in specs for task in _tasks(spec, _view(arena, spec), parts[spec.name])]
    # Tensors side by side on threads of their own: torch's would meet at a barrier a hundred times a tensor.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, tasks):
                pass
    finally:
        torch.set_num_threads(threads)


def _check_names(config: ModelConfig, source: CheckpointReader, known: set[str]) -> None:
    """Raises CheckpointError for tensors of layers that the configuration has no place for: what is computed without
    them is not the model that was saved."""
    spare = f"model.layers.{config.num_layers}." if config.architecture in _WITH_NEXT_TOKEN_LAYER else None
    surplus = [
        name
        for name in source.names
        if name.startswith("model.layers.")
        and name not in known
        and name.removesuffix("_scale_inv") not in known
        and not name.endswith(_WITHOUT_EFFECT)
        and not (spare and name.startswith(spare))
    ]
    if surplus:
        raise CheckpointError(
            f"the checkpoint has {len(surplus)} tensors that its configuration has no place for, such as "
            f"{min(surplus)}: correct the configuration, such as num_hidden_layers, which is {config.num_layers}"
        )


def _check_head(config: ModelConfig, source: CheckpointReader) -> None:
    """Raises CheckpointError for a stored head that is said to be the embedding, and is not: some would compute with
    one, and some with the other."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tie_embeddings or not {head, embedding} <= set(source.names):
        return
    shape, columns = (config.vocab_size, config.hidden_size), range(config.hidden_size)
    for start in range(0, config.vocab_size, TASK_ROWS):
        rows = range(start, min(start + TASK_ROWS, config.vocab_size))
        if not torch.equal(source.read(head, shape, rows, columns), source.read(embedding, shape, rows, columns)):
            raise CheckpointError(
                f"tie_word_embeddings is true, and the checkpoint has an {head} that is not {embedding}: set it to "
                "false to compute with that one, or remove it"
            )


def _view(arena: Arena, spec: TensorSpec) -> Tensor:
    count = math.prod(spec.stored_shape)
    flat = torch.frombuffer(arena.buffer, dtype=getattr(torch, spec.stored_dtype), count=count, offset=spec.offset)
    return flat.view(spec.stored_shape)


def _rows_of(spec: TensorSpec, view: Tensor, first: int, count: int) -> Tensor:
    """Rows of a matrix as they are stored; of a packed one, the panels that they are in."""
    if not spec.packed:
        return view[first : first + count]
    panels = slice(first // PANEL_ROWS, -(-(first + count) // PANEL_ROWS))
    if view.dim() == 1:
        return view.view(-(-spec.shape[0] // PANEL_ROWS), -1)[panels].flatten()
    return view[panels]


def _tasks(spec: TensorSpec, view: Tensor, parts: list[Part]) -> Iterator[tuple[TensorSpec, Tensor, list[Part]]]:
    """A tensor as pieces of work, cut where panels begin: tall matrices and single experts. Less memory in use at a
    time, and all threads have some."""
    if len(spec.shape) == 1 or not parts:
        yield spec, view, parts
        return
    first = row = 0
    held: list[Part] = []

    def piece() -> tuple[TensorSpec, Tensor, list[Part]]:
        rows = row - first
        return dataclasses.replace(spec, shape=(rows, spec.shape[1])), _rows_of(spec, view, first, rows), held

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


def _fill(spec: TensorSpec, view: Tensor, parts: list[Part], source: CheckpointReader) -> None:
    """Writes a tensor's parts, one below the other; zeros if there are none."""
    if not parts:
        view.zero_()
    elif not spec.packed:
        row = 0
        for part in parts:
            values = part.read(source)
            view[row : row + len(values)].copy_(values)
            row += len(values)
    elif spec.dtype == "int4" and (groups := _four_bits(source, parts)):
        kernels.pack_int4(*groups, view)
    else:
        kernels.pack_weight(_joined([part.read(source) for part in parts]), view, spec.dtype)


def _four_bits(source: CheckpointReader, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor] | None:
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


def _collect(views: dict[str, Tensor], specs: list[TensorSpec], config: ModelConfig, shard: Shard) -> Weights:
    def matrix(spec: TensorSpec) -> Matrix:
        view = views[spec.name]
        if not spec.packed:
            return view
        rows, columns = spec.shape
        return kernels.PackedWeight(view, spec.dtype, rows, columns)

    named: dict[str, Matrix] = {spec.name: matrix(spec) for spec in specs}
    layers: list[dict[str, Matrix]] = [{} for _ in range(config.num_layers)]
    for name, value in named.items():
        layer, _, kind = name.partition(".")
        if kind:
            layers[int(layer)][kind] = value
    if "lm_head" not in named:  # rows of the embedding
        table = specs[0]
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
    if config.experts is not None and "router" in named:
        mlp = ExpertWeights(
            count=config.experts.count,
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
