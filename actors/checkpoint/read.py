"""From a path to the configuration of the model there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from actors.checkpoint.config import ModelConfig, check_config
from actors.checkpoint.config_of_gguf import config_of_gguf
from actors.checkpoint.config_of_huggingface import config_of_directory
from actors.checkpoint.errors import CheckpointError
from actors.checkpoint.gguf import GGUFFile


def read_config(path: Path) -> ModelConfig:
    """The configuration of a GGUF file or of a Hugging Face directory.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a model that is not supported.
    """
    if path.is_dir():
        config = config_of_directory(path)
    elif path.is_file():
        config = config_of_gguf(GGUFFile(path))
    else:
        raise CheckpointError(f"{path}: no such file or directory; give a GGUF file or a Hugging Face model directory")
    check_config(path, config)
    return config


def checkpoint_identity(path: Path, config: ModelConfig) -> str:
    """16 hexadecimal digits that two copies of one checkpoint share: of the configuration, and the weights' sizes."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files]
    return hashlib.sha256(msgspec.json.encode((config, sizes))).hexdigest()[:16]
