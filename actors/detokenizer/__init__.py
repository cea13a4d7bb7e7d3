"""The detokenizer: output tokens become text."""

from llm_runtime.actors.detokenizer.actor import Detokenizer, DetokenizerConfig

__all__ = ["Detokenizer", "DetokenizerConfig"]
