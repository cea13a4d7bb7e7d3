"""The Llama family: Llama 3, Mistral, Qwen2 (biases on queries, keys and values), Qwen3 (norms of queries and keys).

Sizes: T new tokens of a step, H the hidden size, D the head size; Hq and Hkv the query and key-value heads of this
rank, V its part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.actors.rank.shard import Shard
from llm_runtime.actors.rank.weights import AttentionWeights, LayerWeights, Matrix, MLPWeights, Weights
from llm_runtime.kernels import AttentionMeta, KVCache

Reduce = Callable[[Tensor], Tensor]
"""Adds up the parts of a result that the ranks of a group hold; the result itself in a group of one."""


class Llama:
    """One rank's part of a model.

    Args:
        max_positions: positions that the rotary tables cover.
        deterministic: a token's result depends on the tokens before it alone, to the bit.
        reduce: see `Reduce`.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        weights: Weights,
        max_positions: int,
        deterministic: bool,
        reduce: Reduce,
    ) -> None:
        self.config = config
        self.weights = weights
        self.reduce = reduce
        self.deterministic = deterministic
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = len(shard.heads), len(shard.kv_heads)
        self.scale = config.head_dim**-0.5
        self.cos, self.sin = kernels.rotary_table(
            config.rotary_dim or config.head_dim,
            max_positions,
            config.rope_theta,
            config.rope_scaling,
            weights.final_norm.device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        return self.weights.nbytes

    def hidden(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """See `Model.hidden`. Kernels alone, so that they can be recorded."""
        residual = kernels.embedding(ids, self.weights.embedding, self.weights.final_norm.dtype)
        x: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            x, residual = self._norm(x, layer.attention_norm, residual)
            x = self.reduce(self._attention(x, layer, meta, *cache.layers[index]))
            x, residual = self._norm(x, layer.mlp_norm, residual)
            x = self.reduce(self._mlp(x, layer))
        return self._norm(x, self.weights.final_norm, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self._logits(hidden)

    def decode(self, ids: Tensor, meta: AttentionMeta, cache: KVCache) -> Tensor:
        """See `Model.decode`."""
        return self._logits(self.hidden(ids, meta, cache))

    def _attention(
        self, x: Tensor, layer: LayerWeights, meta: AttentionMeta, cache: Tensor, cache_scales: Tensor | None
    ) -> Tensor:
        weights = layer.attention
        assert isinstance(weights, AttentionWeights)
        tokens, heads, kv_heads = x.shape[0], self.heads, self.kv_heads
        qkv = self._linear(x, weights.qkv, weights.qkv_bias).view(tokens, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = self._head_norm(q, weights.q_norm), self._head_norm(k, weights.k_norm)
        mixed = kernels.attention(
            q,
            k,
            v,
            cache,
            meta,
            self.cos,
            self.sin,
            self.scale,
            window=self.config.sliding_window,
            deterministic=self.deterministic,
            cache_scales=cache_scales,
        )
        return self._linear(mixed.view(tokens, heads * self.head_dim), weights.o, weights.o_bias)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        assert isinstance(layer.mlp, MLPWeights)
        return self._gated(x, layer.mlp)

    def _gated(self, x: Tensor, weights: MLPWeights) -> Tensor:
        gate_up = self._linear(x, weights.gate_up, weights.gate_up_bias)
        return self._linear(kernels.silu_and_mul(gate_up), weights.down, weights.down_bias)

    def _linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        return kernels.linear(x, weight, bias, deterministic=self.deterministic)

    def _logits(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weights.lm_head, deterministic=self.deterministic, wide=True)

    def _norm(self, x: Tensor | None, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Adds x to the residual stream, if there is an x, and normalizes the stream: (normalized, stream)."""
        if x is None:
            return kernels.rms_norm(residual, weight, self.config.rms_eps)
        return kernels.rms_norm(x, weight, self.config.rms_eps, residual)

    def _head_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalizes each head of [T, heads, D] by itself."""
        return kernels.rms_norm(x, weight, self.config.rms_eps)[0]
