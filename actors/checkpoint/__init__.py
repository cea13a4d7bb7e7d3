"""Reading model checkpoints: GGUF files and Hugging Face directories. Imports no torch."""

from actors.checkpoint.config import Experts, Foreign, Latent, ModelConfig
from actors.checkpoint.errors import CheckpointError
from actors.checkpoint.facts import CheckpointFacts, checkpoint_facts
from actors.checkpoint.gguf import GGUFFile, TensorInfo
from actors.checkpoint.pooling import PoolingConfig, Task, read_pooling_config, task_of
from actors.checkpoint.read import checkpoint_identity, read_config
from actors.checkpoint.sampling import SamplingDefaults, read_sampling_defaults

__all__ = [
    "CheckpointError",
    "CheckpointFacts",
    "Experts",
    "Foreign",
    "GGUFFile",
    "Latent",
    "ModelConfig",
    "PoolingConfig",
    "SamplingDefaults",
    "Task",
    "TensorInfo",
    "checkpoint_facts",
    "checkpoint_identity",
    "read_config",
    "read_pooling_config",
    "read_sampling_defaults",
    "task_of",
]
