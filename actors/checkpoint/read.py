"""From a path to the configuration of the model there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from llm_runtime.actors.checkpoint.config import ModelConfig, check_config
from llm_runtime.actors.checkpoint.config_of_gguf import config_of_gguf
from llm_runtime.actors.checkpoint.config_of_huggingface import config_of_directory
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.files import missing_file, weight_files
from llm_runtime.actors.checkpoint.gguf import GGUFFile


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
    # No token can be drawn that the model does not have: transformers goes on, too, where -1 or a token beyond the
    # vocabulary is to end an answer.
    config = msgspec.structs.replace(
        config,
        bos_token_ids=[token for token in config.bos_token_ids if 0 <= token < config.vocab_size],
        eos_token_ids=[token for token in config.eos_token_ids if 0 <= token < config.vocab_size],
    )
    check_config(path, config)
    return config


def checkpoint_identity(path: Path, config: ModelConfig) -> str:
    """16 hexadecimal digits that two copies of one checkpoint share: of the configuration, and the weights' sizes.

    Raises CheckpointError if a file is missing.
    """
    missing = missing_file(path)
    if missing:
        raise CheckpointError(f"{path}: {missing} is missing; download the model again")
    sizes = [file.stat().st_size for file in weight_files(path)]
    return hashlib.sha256(msgspec.json.encode((config, sizes))).hexdigest()[:16]
