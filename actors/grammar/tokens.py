"""A model's tokens as grammars see them."""

from __future__ import annotations

from functools import cached_property

from llm_runtime.actors.vocabulary import Vocabulary


class Tokens:
    """The texts of a model's tokens.

    Attributes:
        vocab_size: number of logits.
        special: ids of special tokens. ends: ids that end an answer.
        texts: the bytes of each token. Special tokens have none, so that none stands in an answer.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.special = vocabulary.special_ids | frozenset(vocabulary.eos_ids)
        self.ends = [token for token in vocabulary.eos_ids if token < vocab_size]
        known = vocabulary.token_bytes[:vocab_size]
        self.texts = [b"" if token in self.special else text for token, text in enumerate(known)]

    def stops(self, stop_token_ids: list[int]) -> list[int]:
        """The ids that may follow a complete answer to a request with these stop tokens."""
        asked = [token for token in stop_token_ids if token in self.special and token < self.vocab_size]
        return asked or self.ends

    def spell(self, text: bytes) -> list[int]:
        """A text in tokens, the longest first; empty if the vocabulary cannot write it."""
        tokens: list[int] = []
        at = 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                token = self._by_text.get(text[at:end])
                if token is not None:
                    break
            else:
                return []
            tokens.append(token)
            at = end
        return tokens

    @cached_property
    def _by_text(self) -> dict[bytes, int]:
        return {text: token for token, text in enumerate(self.texts) if 0 < len(text) <= self._longest}

    _longest = 16
    """Bytes of a token that `spell` uses."""
