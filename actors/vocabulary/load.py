"""`load_vocabulary`: the vocabulary of a checkpoint, whatever form the checkpoint has."""

from __future__ import annotations

from pathlib import Path

from actors.checkpoint import CheckpointError
from actors.vocabulary.from_gguf import vocabulary_from_gguf
from actors.vocabulary.from_huggingface import vocabulary_from_directory
from actors.vocabulary.vocabulary import Vocabulary


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file or of a Hugging Face directory.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that is not supported.
    """
    if path.is_dir():
        return vocabulary_from_directory(path)
    if path.is_file():
        return vocabulary_from_gguf(path)
    raise CheckpointError(f"{path}: no such file or directory; give a GGUF file or a Hugging Face model directory")
