"""The configuration of a model that transformers' own implementation is to run. Imports transformers when asked to."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from llm_runtime.actors.checkpoint.config import ModelConfig, TransformersShape
from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.files import stored_tensors

LAYERS = {"full_attention", "sliding_attention"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Those whose angles depend on the position alone, and not on what else is computed with it."""


def config_of_transformers(path: Path, architecture: str, known: tuple[str, ...], rest: dict[str, Any]) -> ModelConfig:
    """What the runtime must know of a model for its pages, not checked.

    Args:
        known: architectures that need no transformers. rest: fields of the configuration that have been read already.

    Raises:
        CheckpointError: transformers is not installed, does not know the architecture, or keeps more of a sequence than
            keys and values.
    """
    supported = f"{path}: architecture {architecture} is not supported; supported are {', '.join(known)}"
    try:
        transformers = importlib.import_module("transformers")
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
    except ImportError:
        raise CheckpointError(
            f'{supported}, and others after `pip install "transformers>=5.12,<6"`, which runs them slowly'
        ) from None
    if architecture not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise CheckpointError(f"{supported}, and those that transformers {transformers.__version__} has for language")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        model = getattr(transformers, architecture)
    except Exception as error:  # whatever a configuration from outside leads to there
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{supported}; transformers cannot read this one ({reason})") from None
    if problem := _problem(model, config, text):
        raise CheckpointError(f"{path}: architecture {architecture} is not supported, for {problem}")
    heads, hidden = text.num_attention_heads, text.hidden_size
    shapes = [tensor.shape for tensor in stored_tensors(path).values()]
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocab_size=text.vocab_size,
        max_position=text.max_position_embeddings,
        rope_theta=1.0,
        rms_eps=1.0,
        tie_embeddings=False,
        transformers=TransformersShape(parameters=sum(map(math.prod, shapes)), tensors=len(shapes)),
        **rest,
    )


def _problem(model: Any, config: Any, text: Any) -> str | None:
    """Why a model of transformers cannot be run over pages of keys and values; None if nothing speaks against it."""
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(text, name, None), int):
            return f"its configuration does not say {name} in one number"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    if not model._supports_attention_backend:
        return "its attention in transformers cannot be replaced"
    if model._is_stateful or getattr(config, "is_encoder_decoder", False):
        return "it keeps more of a sequence than keys and values"
    kinds = set(getattr(text, "layer_types", None) or [])
    if not kinds <= LAYERS:
        return f"it has layers of the kinds {', '.join(sorted(kinds - LAYERS))}"
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in [ropes, *(each for each in ropes.values() if isinstance(each, dict))]:
        if rope.get("rope_type", "default") not in ROPES:
            return f"its rope scaling is {rope['rope_type']!r}"
    return None
