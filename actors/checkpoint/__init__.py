"""Reading model checkpoints: GGUF files and Hugging Face directories. Imports no torch."""

from actors.checkpoint.config import ModelConfig, checkpoint_identity, read_config
from actors.checkpoint.errors import CheckpointError
from actors.checkpoint.gguf import GGUFFile, TensorInfo

__all__ = ["CheckpointError", "GGUFFile", "ModelConfig", "TensorInfo", "checkpoint_identity", "read_config"]
