"""A decoder that embeds or classifies: the state behind its last layer, from the implementation that generates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.checkpoint import PoolingConfig
from llm_runtime.actors.dtypes import WeightDType
from llm_runtime.actors.encoder.models.tensors import Tensors
from llm_runtime.actors.encoder.sizes import PAGE_SIZE, scratch_format, scratch_pages
from llm_runtime.actors.rank.models import model_class
from llm_runtime.actors.rank.shard import shard_of
from llm_runtime.actors.rank.weights import load_weights
from llm_runtime.kernels import AttentionMeta


class Decoder:
    """A decoder with pooling, and a classifier's matrix if it has one.

    Args:
        path: GGUF file or directory.
        weights: descriptor of the arena of weights.
        max_tokens: of one batch.

    Raises CheckpointError for a checkpoint that is damaged, StartFailure where it cannot be computed here.
    """

    def __init__(
        self, path: Path, config: PoolingConfig, dtype: WeightDType, weights: int, max_tokens: int, max_model_len: int
    ) -> None:
        assert config.decoder is not None
        self.config = config
        shard = shard_of(config.decoder, 1, 0)
        packed = kernels.backend() != "torch"
        loaded = load_weights(path, config.decoder, dtype, shard, packed, weights, check_head=False)
        kernels.tune(loaded.packed)
        self._model = model_class(config.decoder.architecture)(
            config.decoder, shard, loaded, max_model_len, False, lambda part: part
        )
        self._cache = scratch_format(config.decoder, dtype).new_cache(scratch_pages(max_tokens), torch.device("cpu"))
        self._head: Tensor | None = None
        self.nbytes = loaded.nbytes
        if config.task == "classify":
            with Tensors(path) as tensors:
                self._head = tensors.get("score.weight", (len(config.labels), config.decoder.hidden_size)).clone()
                self.nbytes += tensors.nbytes

    def vectors(self, sequences: Sequence[Tensor], types: Sequence[Tensor | None]) -> Tensor:
        """The answers to sequences, float32 [n, vector size]; see `Bert.vectors`. There are no token types."""
        lengths = [len(sequence) for sequence in sequences]
        ends = list(accumulate(lengths))
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            table[row, :count] = torch.arange(end - count, end, dtype=torch.int32)
        meta = AttentionMeta.build([0] * len(lengths), lengths, table)
        states = self._model.hidden(torch.cat(list(sequences)), meta, self._cache)
        if self.config.pooling == "mean":
            return torch.stack([each.mean(0) for each in states.float().split(lengths)])
        at = [end - 1 for end in ends] if self.config.pooling == "last" else [0, *ends[:-1]]
        vectors: Tensor = states[at].float()
        return vectors if self._head is None else vectors @ self._head.T
