"""Decoders of the Llama family that have mixtures of experts in the place of MLPs: Qwen3-MoE, GLM-4.5 and 4.6.

Sizes: T new tokens of a step, H the hidden size, E experts.
"""

from __future__ import annotations

from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.rank.models.llama import Llama
from llm_runtime.actors.rank.weights import ExpertWeights, LayerWeights


class MixtureOfExperts(Llama):
    """One rank's part of a model: of each expert some of its intermediate features, so that parts are added up."""

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        weights, experts = layer.mlp, self.config.experts
        if not isinstance(weights, ExpertWeights) or experts is None:
            return super()._mlp(x, layer)
        # Every rank chooses for itself, and all choose the same: x is the same to the bit.
        logits = kernels.linear(kernels.widen(x), weights.router, deterministic=self.deterministic)
        ids, factors = kernels.route_experts(
            logits,
            top_k=experts.top_k,
            scoring=experts.scoring,
            bias=weights.router_bias,
            groups=experts.groups,
            top_groups=experts.top_groups,
            normalize=experts.normalize,
            scaling=experts.scaling,
        )
        return kernels.experts(
            x,
            ids,
            factors,
            weights.gate_up,
            weights.down,
            experts.count,
            deterministic=self.deterministic,
            shared=None if weights.shared is None else self._gated(x, weights.shared),
        )
