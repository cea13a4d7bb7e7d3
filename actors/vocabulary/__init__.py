"""A model's tokens: bytes, special ids, chat templates, and the encoder, read from a checkpoint."""

from actors.vocabulary.ids import pack_ids, unpack_ids
from actors.vocabulary.load import load_vocabulary
from actors.vocabulary.vocabulary import Vocabulary

__all__ = ["Vocabulary", "load_vocabulary", "pack_ids", "unpack_ids"]
