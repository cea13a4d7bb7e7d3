"""Models that transformers' own implementation runs, with their attention over the pages of this runtime.

Every row of a step is a part of one long sequence to transformers. Each layer's attention, which transformers leaves to
a function that can be registered, takes the rows apart again. That is slower than a model of this package, and needs
nothing to be written for it.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_runtime import kernels
from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import ModelConfig, checkpoint_identity
from llm_runtime.actors.dtypes import ComputeDType
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.rank.shard import ALIGNMENT, HEADER_BYTES
from llm_runtime.actors.rank.weights_arena import (
    Contents,
    StoredTensor,
    check_room,
    compare_identities,
    contents_of,
    identity_of,
    packing,
    sealed_arena,
)
from llm_runtime.kernels import AttentionMeta, KVCache
from llm_runtime.transport import Arena

logger = logging.getLogger(__name__)

ATTENTION = "llm_runtime"
"""The name under which transformers knows this attention."""
NOT_SUPPORTED = ("softcap", "s_aux", "position_bias", "attn_bias", "head_mask", "layer_head_mask", "block_table")
"""What some models ask of attention besides."""
PROBE = 11
"""Tokens by which an implementation is tried: in two steps, against all at once without pages."""
TOLERANCE: dict[ComputeDType, float] = {"float32": 0.01, "bfloat16": 0.3}
"""Deviations from the results without pages that rounding explains, in standard deviations of the logits."""


class _Refused(Exception):
    """The model needs something that is not there. The message says what."""


class _Running:
    """The step that is being computed in this process."""

    def __init__(self) -> None:
        self.step: tuple[AttentionMeta, KVCache, Tensor] | None = None
        self.layers: list[int] = []
        """Layers whose attention has been computed."""

    @contextmanager
    def of(self, meta: AttentionMeta, cache: KVCache, angles: Tensor) -> Iterator[None]:
        self.step = meta, cache, angles
        self.layers.clear()
        try:
            yield
        finally:
            self.step = None


_running = _Running()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, heads, T, D], keys and values [1, key heads, T, D], rotated."""
    unknown = [name for name in NOT_SUPPORTED if others.get(name) is not None]
    if _running.step is None or unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        raise _Refused(f"its attention is not plain causal attention ({', '.join(unknown) or 'another mask'})")
    meta, cache, angles = _running.step
    _running.layers.append(module.layer_idx)
    vectors, scales = cache.layers[module.layer_idx]
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    if not k.shape[1:] == v.shape[1:] == vectors.shape[3:]:
        raise _Refused(
            f"its keys {tuple(k.shape[1:])} and values {tuple(v.shape[1:])} are not {tuple(vectors.shape[3:])}"
        )
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = kernels.attention(q, k, v, vectors, meta, angles, angles, scale, window=sliding_window, cache_scales=scales)
    return mixed[None], None


class TransformersModel:
    """A language model of transformers.

    Args:
        module: the model.
        nbytes: of its weights.
        max_positions: positions that a sequence may have.
    """

    def __init__(self, config: ModelConfig, module: Any, nbytes: int, max_positions: int) -> None:
        self.config = config
        self.nbytes = nbytes
        self._module = module
        self._base = getattr(module, module.base_model_prefix)
        # Transformers rotates, so there is nothing to rotate here: tables of no angles.
        self._angles = torch.empty(max_positions, 0, device=module.device)
        # What a model does with its last states, with the states in the place of what computes them.
        self._head: Any = copy.copy(module)
        self._head._modules = {**module._modules, module.base_model_prefix: _Given()}

    def hidden(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """See `Model.hidden`."""
        with _running.of(meta, cache, self._angles):
            output = self._base(input_ids=ids[None], position_ids=meta.positions[None], use_cache=False)
        states: Tensor = output.last_hidden_state[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        getattr(self._head, self._module.base_model_prefix).states = hidden[None]
        logits: Tensor = self._head(input_ids=ids, use_cache=False).logits[0].float()
        return logits

    def decode(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """See `Model.decode`."""
        return self.logits(self.hidden(ids, meta, cache))

    def check(self, pages: KVFormat, dtype: ComputeDType) -> None:
        """Compares a few tokens computed over pages with what transformers computes without any.

        Raises _Refused if they differ, or a layer has no attention of the kind that is registered.
        """
        ids = torch.arange(PROBE, device=self._angles.device) * 7919 % self.config.vocab_size
        self._module.set_attn_implementation("eager")
        wanted = self._module(input_ids=ids[None], use_cache=False).logits[0].float()
        self._module.set_attn_implementation(ATTENTION)
        count = -(-PROBE // pages.page_size)
        cache = pages.new_cache(count, ids.device)
        table = torch.arange(count, dtype=torch.int32, device=ids.device)[None]
        parts = []
        for start, end in ((0, PROBE // 2), (PROBE // 2, PROBE)):
            meta = AttentionMeta.build([start], [end - start], table)
            parts.append(self.logits(self.hidden(ids[start:end], meta, cache)))
            if sorted(_running.layers) != list(range(self.config.num_layers)):
                raise _Refused("it has layers without attention of their own")
        error = (torch.cat(parts) - wanted).abs().max()
        if not error <= TOLERANCE[dtype] * wanted.std():
            raise _Refused("over pages of keys and values it computes something else")


class _Given(nn.Module):
    """Stands where a model computes its states, and has them already."""

    states: Tensor

    @property
    def decoder(self) -> _Given:
        """Some models ask the decoder in their base model."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        outputs = importlib.import_module("transformers.modeling_outputs")
        output = outputs.MoeModelOutputWithPast(last_hidden_state=self.states)
        output.cross_attentions = None  # which some pass on
        return output


def load_transformers(
    path: Path,
    config: ModelConfig,
    dtype: ComputeDType,
    pages: KVFormat,
    max_positions: int,
    descriptor: int,
    device: torch.device,
) -> TransformersModel:
    """A model with its weights in an arena, as `load_weights` keeps them.

    Raises StartFailure if transformers is missing, or cannot run the model over pages.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise StartFailure(
            f'{config.architecture} needs transformers: run `pip install "transformers>=5.12,<6"`'
        ) from None
    transformers.AttentionInterface.register(ATTENTION, _attention)
    try:
        with torch.inference_mode():
            module, nbytes = _module(transformers, path, config, dtype, descriptor, device)
            model = TransformersModel(config, module, nbytes, max_positions)
            model.check(pages, dtype)
        return model
    except StartFailure:
        raise
    except Exception as error:  # whatever an implementation from outside does
        logger.warning("transformers cannot run %s", config.architecture, exc_info=not isinstance(error, _Refused))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StartFailure(f"{config.architecture} cannot be run by transformers' implementation: {reason}") from None


def _module(
    transformers: Any, path: Path, config: ModelConfig, dtype: ComputeDType, descriptor: int, device: torch.device
) -> tuple[Any, int]:
    """The model, its weights those of the arena, and their bytes."""
    kind = getattr(transformers, config.architecture)
    identity = identity_of(path, dtype, 1, 0, False)
    found = contents_of(descriptor)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": ATTENTION}
    if found is None:
        transformers.utils.logging.disable_progress_bar()
        module = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **options)
        tensors, size = _places(module)
        check_room(descriptor, size)
        with packing(descriptor, Contents(identity, config, checkpoint_identity(path, config), tensors)) as arena:
            values = module.state_dict()
            for place in tensors:
                _view(arena, place).copy_(values[place.name])
    else:
        compare_identities(found.identity, identity)
        tensors = found.tensors
        with importlib.import_module("transformers.initialization").no_init_weights():
            module = kind._from_config(transformers.AutoConfig.from_pretrained(path, local_files_only=True), **options)
    arena = sealed_arena(descriptor)
    views = {place.name: _view(arena, place).to(device) for place in tensors}
    module.load_state_dict(views, assign=True)
    return module.eval().to(device), sum({view.data_ptr(): view.nbytes for view in views.values()}.values())


def _places(module: Any) -> tuple[list[StoredTensor], int]:
    """A place for each of a model's tensors, one for those that share their memory, and the bytes of the whole."""
    end = HEADER_BYTES
    places: list[StoredTensor] = []
    offsets: dict[tuple[int, torch.Size], int] = {}
    for name, values in module.state_dict().items():
        key = values.data_ptr(), values.shape
        if key not in offsets:
            offsets[key] = end
            end += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        places.append(StoredTensor(name, str(values.dtype).removeprefix("torch."), list(values.shape), offsets[key]))
    return places, end


def _view(arena: Arena, place: StoredTensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, place.dtype)
    count = 1
    for length in place.shape:
        count *= length
    return torch.frombuffer(arena.buffer, dtype=dtype, count=count, offset=place.offset).view(place.shape)
