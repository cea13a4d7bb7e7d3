"""Models by architecture. Each file here is one family, from token ids to logits."""

from __future__ import annotations

from actors.rank.models.deepseek import DeepseekV3
from actors.rank.models.llama import Llama
from actors.rank.models.moe import MixtureOfExperts

MODELS: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "Qwen3MoeForCausalLM": MixtureOfExperts,
    "Glm4MoeForCausalLM": MixtureOfExperts,
    "DeepseekV3ForCausalLM": DeepseekV3,
}

__all__ = ["MODELS", "DeepseekV3", "Llama", "MixtureOfExperts"]
