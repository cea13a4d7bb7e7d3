"""`Model`: what an executor asks of a model, whoever implements it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.kernels import AttentionMeta, KVCache


class Model(Protocol):
    """One rank's part of a model, from token ids to logits. Sizes: T new tokens of a step, H the hidden size, V this
    rank's part of the vocabulary."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        ...

    def hidden(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """The state from which logits are computed, behind the final norm, of int64 ids [T]: [T, H]. Writes the new
        tokens' keys and values, or what the model keeps in their place, into the cache. Recorded as a graph where it is
        kernels alone; see `kernels.SizedGraph` for what a model may do here."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits of states [B, H]: float32 [B, V]."""
        ...

    def decode(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """`hidden` and then `logits` of all new tokens: float32 [T, V]. Recorded as a graph where it is kernels alone;
        see `kernels.StepGraph` for what a model may do here."""
        ...
