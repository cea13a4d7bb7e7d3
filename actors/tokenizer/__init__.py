"""The tokenizer: prompts become token ids."""

from actors.tokenizer.actor import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
