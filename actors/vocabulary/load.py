"""`load_vocabulary`: the vocabulary of a checkpoint, whatever form the checkpoint has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.vocabulary.from_gguf import vocabulary_from_gguf
from llm_runtime.actors.vocabulary.from_huggingface import vocabulary_from_directory
from llm_runtime.actors.vocabulary.vocabulary import Vocabulary


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file or of a Hugging Face directory.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that is not supported.
    """
    try:
        status = path.stat()
    except OSError:
        status = None
    return _load(path, status and (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=8)
def _load(path: Path, version: tuple[int, int, int] | None) -> Vocabulary:
    """Kept in the process, so that processes forked from one that has loaded it start with it."""
    if path.is_dir():
        return vocabulary_from_directory(path)
    if path.is_file():
        return vocabulary_from_gguf(path)
    raise CheckpointError(f"{path}: no such file or directory; give a GGUF file or a Hugging Face model directory")
