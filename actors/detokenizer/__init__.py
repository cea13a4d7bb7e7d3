"""The detokenizer: output tokens become text."""

from actors.detokenizer.actor import Detokenizer, DetokenizerConfig

__all__ = ["Detokenizer", "DetokenizerConfig"]
