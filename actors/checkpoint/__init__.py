"""Reading model checkpoints: GGUF files and Hugging Face directories. Imports no torch."""

from actors.checkpoint.config import Experts, Foreign, Latent, ModelConfig
from actors.checkpoint.errors import CheckpointError
from actors.checkpoint.gguf import GGUFFile, TensorInfo
from actors.checkpoint.read import checkpoint_identity, read_config

__all__ = [
    "CheckpointError",
    "Experts",
    "Foreign",
    "GGUFFile",
    "Latent",
    "ModelConfig",
    "TensorInfo",
    "checkpoint_identity",
    "read_config",
]
