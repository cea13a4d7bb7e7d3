"""Models by architecture. Each file here is one family, from token ids to logits."""

from __future__ import annotations

from actors.rank.models.llama import Llama

MODELS: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
}

__all__ = ["MODELS", "Llama"]
