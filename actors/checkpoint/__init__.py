"""Reading model checkpoints: GGUF files and Hugging Face directories. Imports no torch."""

from llm_runtime.actors.checkpoint.config import Experts, Latent, ModelConfig, TransformersShape
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.facts import CheckpointFacts, checkpoint_facts
from llm_runtime.actors.checkpoint.gguf import GGUFFile, TensorInfo
from llm_runtime.actors.checkpoint.pooling import PoolingConfig, Task, read_pooling_config, task_of
from llm_runtime.actors.checkpoint.read import checkpoint_identity, read_config
from llm_runtime.actors.checkpoint.sampling import SamplingDefaults, read_sampling_defaults

__all__ = [
    "CheckpointError",
    "CheckpointFacts",
    "Experts",
    "GGUFFile",
    "Latent",
    "ModelConfig",
    "PoolingConfig",
    "SamplingDefaults",
    "Task",
    "TensorInfo",
    "TransformersShape",
    "checkpoint_facts",
    "checkpoint_identity",
    "read_config",
    "read_pooling_config",
    "read_sampling_defaults",
    "task_of",
]
