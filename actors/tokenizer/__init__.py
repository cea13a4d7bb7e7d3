"""The tokenizer: prompts become token ids."""

from llm_runtime.actors.tokenizer.actor import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
