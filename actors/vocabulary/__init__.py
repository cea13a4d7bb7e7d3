"""A model's tokens: bytes, special ids, chat templates, and the encoder, read from a checkpoint."""

from llm_runtime.actors.vocabulary.ids import pack_ids, unpack_ids
from llm_runtime.actors.vocabulary.load import load_vocabulary
from llm_runtime.actors.vocabulary.vocabulary import Vocabulary

__all__ = ["Vocabulary", "load_vocabulary", "pack_ids", "unpack_ids"]
