"""BERT and the RoBERTa family, and their classification heads, in float32.

Sizes: T tokens of a batch, H the hidden size. Sequences lie one behind the other without padding, the short ones first:
those of one length are a rectangle for attention and pooling, and everything else goes by tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention

from llm_runtime.actors.checkpoint import PoolingConfig
from llm_runtime.actors.encoder.models.tensors import Tensors


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    query: _Linear
    key: _Linear
    value: _Linear
    out: _Linear
    attention_norm: _Norm
    up: _Linear
    down: _Linear
    norm: _Norm


class Bert:
    """An encoder with its pooling and head.

    Args:
        path: the model's directory.

    Raises CheckpointError for a checkpoint that does not have the tensors which its configuration promises.
    """

    def __init__(self, path: Path, config: PoolingConfig) -> None:
        assert config.encoder is not None
        self.config = config
        self.sizes = sizes = config.encoder
        with Tensors(path) as tensors:
            self._tensors = tensors
            self._prefix = sizes.prefix if f"{sizes.prefix}embeddings.word_embeddings.weight" in tensors else ""
            hidden = sizes.hidden_size
            self._words = self._get("embeddings.word_embeddings.weight", config.vocab_size, hidden)
            self._positions = self._get("embeddings.position_embeddings.weight", sizes.positions, hidden)
            self._types = self._get("embeddings.token_type_embeddings.weight", sizes.types, hidden)
            self._norm = self._norm_of("embeddings.LayerNorm")
            self._layers = [self._layer(f"encoder.layer.{index}") for index in range(sizes.num_layers)]
            self._head = self._classifier() if config.task == "classify" else []
            self.nbytes = tensors.nbytes

    def vectors(self, sequences: Sequence[Tensor], types: Sequence[Tensor | None]) -> Tensor:
        """The answers to sequences, float32 [n, vector size].

        Args:
            sequences: token ids, int64 [length], the short ones first. types: token type ids of each, None for zeros.
        """
        lengths = [len(sequence) for sequence in sequences]
        states = self._states(sequences, types, lengths)
        vectors = torch.cat(
            [
                self._pool(states[begin:end].view(count, length, -1))
                for begin, end, count, length in _rectangles(lengths)
            ]
        )
        if self._head:
            dense, out = self._head
            return out(torch.tanh(dense(vectors)))
        return vectors

    def _pool(self, states: Tensor) -> Tensor:
        """Of sequences of one length, [n, length, H] → [n, H]."""
        if self.config.pooling == "mean":
            return states.mean(1)
        return states[:, 0 if self.config.pooling == "cls" else -1]

    def _states(self, sequences: Sequence[Tensor], types: Sequence[Tensor | None], lengths: list[int]) -> Tensor:
        first = self.sizes.first_position
        x = self._words[torch.cat(list(sequences))]
        x = x + torch.cat([self._positions[first : first + length] for length in lengths])
        if all(each is None for each in types):
            x = x + self._types[0]
        else:
            pairs = zip(types, lengths, strict=True)
            x = x + self._types[torch.cat([torch.zeros(n, dtype=torch.int64) if t is None else t for t, n in pairs])]
        x = self._norm(x)
        activation = self.sizes.activation
        for layer in self._layers:
            x = layer.attention_norm(x + layer.out(self._attention(x, layer, lengths)))
            up = layer.up(x)
            if activation == "relu":
                up = relu(up)
            else:
                up = gelu(up, approximate="none" if activation == "gelu" else "tanh")
            x = layer.norm(x + layer.down(up))
        return x

    def _attention(self, x: Tensor, layer: _Layer, lengths: list[int]) -> Tensor:
        heads = self.sizes.num_heads
        q, k, v = (project(x).view(len(x), heads, -1) for project in (layer.query, layer.key, layer.value))
        mixed = torch.empty_like(q)
        for begin, end, count, length in _rectangles(lengths):
            shape = count, length, heads, -1
            query, key, value = (each[begin:end].view(shape).transpose(1, 2) for each in (q, k, v))
            mixed[begin:end] = (
                scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(end - begin, heads, -1)
            )
        return mixed.view(x.shape)

    # -- weights --------------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> _Layer:
        hidden, wide = self.sizes.hidden_size, self.sizes.intermediate_size
        return _Layer(
            query=self._linear(f"{name}.attention.self.query", hidden, hidden),
            key=self._linear(f"{name}.attention.self.key", hidden, hidden),
            value=self._linear(f"{name}.attention.self.value", hidden, hidden),
            out=self._linear(f"{name}.attention.output.dense", hidden, hidden),
            attention_norm=self._norm_of(f"{name}.attention.output.LayerNorm"),
            up=self._linear(f"{name}.intermediate.dense", wide, hidden),
            down=self._linear(f"{name}.output.dense", hidden, wide),
            norm=self._norm_of(f"{name}.output.LayerNorm"),
        )

    def _classifier(self) -> list[_Linear]:
        """A classifier's two layers, between which is a tanh."""
        hidden, labels = self.sizes.hidden_size, len(self.config.labels)
        names = ("classifier.dense", "classifier.out_proj")
        if self.sizes.family == "Bert":
            names = (f"{self._prefix}pooler.dense", "classifier")
        self._prefix = ""
        return [self._linear(names[0], hidden, hidden), self._linear(names[1], labels, hidden)]

    def _linear(self, name: str, rows: int, columns: int) -> _Linear:
        return _Linear(self._get(f"{name}.weight", rows, columns), self._get(f"{name}.bias", rows))

    def _norm_of(self, name: str) -> _Norm:
        hidden = self.sizes.hidden_size
        return _Norm(self._get(f"{name}.weight", hidden), self._get(f"{name}.bias", hidden), self.sizes.norm_eps)

    def _get(self, name: str, *shape: int) -> Tensor:
        return self._tensors.get(self._prefix + name, shape)


def _rectangles(lengths: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Runs of sequences of one length: their first token, the one behind their last, how many, and the length."""
    begin = index = 0
    while index < len(lengths):
        length, first = lengths[index], index
        while index < len(lengths) and lengths[index] == length:
            index += 1
        end = begin + (index - first) * length
        yield begin, end, index - first, length
        begin = end
