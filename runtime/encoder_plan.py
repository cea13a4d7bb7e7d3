"""Engines of models that embed or classify, as they are decided before a node starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import PoolingConfig
from llm_runtime.actors.checkpoint.files import weight_files
from llm_runtime.actors.dtypes import WeightDType
from llm_runtime.actors.encoder import scratch_bytes
from llm_runtime.actors.rank.quantization_policy import auto_dtype
from llm_runtime.actors.rank.shard import weight_bytes
from llm_runtime.runtime.models import ResolvedModel
from llm_runtime.runtime.topology import Engine, LoadedTopology, Model

ENGINE_KEYS = ("model", "node", "threads", "chunk_tokens", "max_queue")
"""What such an engine can be told."""
_MODEL_KEYS = ("deterministic", "chat_template")
_INGRESS_KEYS = ("tool_call_parser", "reasoning_parser")


@dataclass(frozen=True)
class EncoderPlan:
    """One engine that is an encoder process.

    Attributes:
        dtype: of the weights.
        weight_bytes: their size. weights_arena: the arena that holds them; empty where the checkpoint's file is mapped.
        scratch_bytes: memory for keys and values of a batch, which a decoder needs.
        threads: of the process.
        model_key: the table of its model in the topology.
    """

    name: str
    settings: Engine
    dtype: WeightDType
    weight_bytes: int
    weights_arena: str
    scratch_bytes: int
    threads: int
    model_key: str = "model"

    @property
    def actor(self) -> str:
        return f"{self.name}.encoder"


def plan_encoder(
    loaded: LoadedTopology,
    name: str,
    config: PoolingConfig,
    settings: Model,
    key: str,
    model: ResolvedModel,
    max_model_len: int,
    threads: int,
) -> EncoderPlan:
    """One engine. Raises TopologyError for what the model does not allow.

    Args:
        settings: its model's. key: the model's table.
        threads: where the topology does not say.
    """
    engine, dtype = loaded.topology.engine[name], settings.dtype
    arena, scratch = "", 0
    if config.decoder is None:
        if dtype not in ("auto", "float32"):
            raise loaded.error(f"{key}.dtype", f'is "{dtype}", and encoders are computed in float32; remove the key')
        dtype = "float32"
        size = sum(file.stat().st_size for file in weight_files(model.path))
    else:
        if dtype == "auto":
            dtype = auto_dtype(config.decoder)
        arena = f"{name}.encoder.weights"
        try:
            size = weight_bytes(config.decoder, dtype, 1, 0)
            scratch = scratch_bytes(config.decoder, dtype, max(engine.chunk_tokens, max_model_len))
        except StartFailure as failure:
            raise loaded.error(f"{key}.dtype", str(failure)) from None
    return EncoderPlan(name, engine, dtype, size, arena, scratch, engine.threads or threads, key)


def check_keys(loaded: LoadedTopology, task: str, model_key: str, engines: Iterable[str]) -> None:
    """Raises TopologyError for a key that is given and would do nothing for a model of this task.

    Args:
        model_key: the model's table. engines: its engines' names.
    """
    of_engines = [(name, key) for name in engines for key in Engine.__struct_fields__]
    keys = [
        *(f"{model_key}.{key}" for key in _MODEL_KEYS),
        *(f"ingress.{key}" for key in _INGRESS_KEYS if len(loaded.topology.models) == 1),
        *(f"engine.{name}.{key}" for name, key in of_engines if key not in ENGINE_KEYS),
    ]
    for key in keys:
        if loaded.is_given(key):
            raise loaded.error(key, f"is for models that generate, and this one is for the task {task}; remove the key")
