"""DeepSeek-V3 and R1 (https://arxiv.org/abs/2412.19437): latent attention, and experts of `actors.rank.models.moe`.

Sizes: T new tokens of a step, H the hidden size, Hq query heads of this rank, R the size of a latent vector.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.rank.models.moe import MixtureOfExperts
from llm_runtime.actors.rank.weights import LatentWeights, LayerWeights
from llm_runtime.kernels import AttentionMeta

LATENT_EPS = 1e-6
"""Of the norms of latent vectors, whatever that of the others is."""
LONG_ROW = 32
"""New tokens of a row below which the expanded form of attention is not considered."""


class DeepseekV3(MixtureOfExperts):
    """One rank's part of a model: some of the heads, and the latent vectors of all.

    Attention has two forms with one result but for rounding. The absorbed one attends to the cached latents themselves;
    the expanded one makes keys and values of them first, which is less work for rows of many new tokens. With
    `deterministic` all rows go the absorbed way, so that chunks do not matter.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.config.latent is not None
        self.latent = self.config.latent
        scaling = self.config.rope_scaling or {}
        if scaling.get("rope_type") == "yarn" and scaling.get("mscale_all_dim"):
            factor = float(scaling["factor"])
            stretch = 0.1 * float(scaling["mscale_all_dim"]) * math.log(factor) + 1.0 if factor > 1 else 1.0
            self.scale *= stretch * stretch

    def _attention(
        self, x: Tensor, layer: LayerWeights, meta: AttentionMeta, cache: Tensor, cache_scales: Tensor | None
    ) -> Tensor:
        weights, latent, tokens = layer.attention, self.latent, len(x)
        assert isinstance(weights, LatentWeights)
        qkv = self._linear(x, weights.qkv, weights.qkv_bias)
        q, kv, k_rope = qkv.split_with_sizes(
            (qkv.shape[1] - latent.kv_rank - latent.rope_dim, latent.kv_rank, latent.rope_dim), 1
        )
        if weights.q is not None and weights.q_norm is not None:
            q = self._linear(self._latent_norm(q, weights.q_norm), weights.q)
        q = q.view(tokens, self.heads, self.head_dim)
        kv = self._latent_norm(kv, weights.kv_norm)
        long = self._long_rows(meta)
        if not long:
            values = self._absorbed(q, kv, k_rope, weights, meta, cache)
        elif len(long) == meta.num_rows:
            values = self._expanded(q, kv, k_rope, weights, meta, cache)
        else:
            values = x.new_empty(tokens, self.heads, latent.value_dim)
            others = [row for row in range(meta.num_rows) if row not in set(long)]
            for rows, attend in ((long, self._expanded), (others, self._absorbed)):
                part, chosen = meta.select(rows)
                values[chosen] = attend(q[chosen], kv[chosen], k_rope[chosen], weights, part, cache)
        return self._linear(values.view(tokens, -1), weights.o, weights.o_bias)

    def _absorbed(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, weights: LatentWeights, meta: AttentionMeta, cache: Tensor
    ) -> Tensor:
        q_nope, q_rope = q.split_with_sizes((self.latent.nope_dim, self.latent.rope_dim), 2)
        to_latents, to_values = self._of_heads(weights)
        mixed = kernels.mla_attention(
            kernels.linear_heads(q_nope, to_latents, deterministic=self.deterministic),
            q_rope,
            kv,
            k_rope,
            cache,
            meta,
            self.cos,
            self.sin,
            self.scale,
            interleaved=self.latent.interleaved,
            deterministic=self.deterministic,
        )
        return kernels.linear_heads(mixed, to_values, deterministic=self.deterministic)

    def _expanded(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, weights: LatentWeights, meta: AttentionMeta, cache: Tensor
    ) -> Tensor:
        q_nope, q_rope = q.split_with_sizes((self.latent.nope_dim, self.latent.rope_dim), 2)
        return kernels.mla_prefill(
            q_nope,
            q_rope,
            kv,
            k_rope,
            cache,
            meta,
            self.cos,
            self.sin,
            self.scale,
            *self._of_heads(weights),
            interleaved=self.latent.interleaved,
        )

    def _long_rows(self, meta: AttentionMeta) -> list[int]:
        """The rows that the expanded form is less work for, by the multiplications for one head.

        Expanding costs as much for each older token as the absorbed form spends on a new one; it saves a part of each
        pair of a query and a key.
        """
        if self.deterministic or meta.max_query < LONG_ROW:
            return []
        latent = self.latent
        expanding = latent.kv_rank * (latent.nope_dim + latent.value_dim)
        saved = 2 * latent.kv_rank - latent.nope_dim - latent.value_dim
        rows = []
        for row, ((first, last), (_, end)) in enumerate(zip(meta.token_ranges, meta.slots_and_ends, strict=True)):
            new = last - first
            older = end - new
            if new >= LONG_ROW and new * (older + new / 2) * saved > older * expanding:
                rows.append(row)
        return rows

    def _of_heads(self, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """Matrices of the single heads: [Hq, R, nope_dim] and [Hq, value_dim, R]."""
        latent = self.latent
        to_latents = weights.k_absorb.view(self.heads, latent.kv_rank, latent.nope_dim)
        return to_latents, weights.v_up.view(self.heads, latent.value_dim, latent.kv_rank)

    def _latent_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalizes x [T, size], which may be a part of wider rows."""
        return kernels.rms_norm(x[:, None], weight, LATENT_EPS)[0][:, 0]
