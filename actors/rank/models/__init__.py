"""Models by architecture. Each file here is one family, from token ids to logits."""

from __future__ import annotations

from typing import Any

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint.plugins import plugin
from llm_runtime.actors.rank.models.deepseek import DeepseekV3
from llm_runtime.actors.rank.models.llama import Llama
from llm_runtime.actors.rank.models.model import Model
from llm_runtime.actors.rank.models.moe import MixtureOfExperts

MODELS: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "Qwen3MoeForCausalLM": MixtureOfExperts,
    "Glm4MoeForCausalLM": MixtureOfExperts,
    "DeepseekV3ForCausalLM": DeepseekV3,
}

__all__ = ["DeepseekV3", "Llama", "MixtureOfExperts", "Model", "model_class"]


def model_class(architecture: str) -> Any:
    """The class for an architecture: of this package, or of another (see `actors.checkpoint.plugins`).

    Raises StartFailure if there is none.
    """
    try:
        found = MODELS.get(architecture) or plugin(architecture)
    except (ImportError, AttributeError) as error:
        raise StartFailure(f"the package for architecture {architecture} cannot be used ({error})") from None
    if found is None:
        raise StartFailure(f"there is no model of architecture {architecture} any more: restart the node")
    return found
