"""The models of a node as they are decided before it starts, each with its engines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jinja2
import msgspec

from llm_runtime.actors.checkpoint import (
    CheckpointError,
    ModelConfig,
    PoolingConfig,
    SamplingDefaults,
    Task,
    read_config,
    read_pooling_config,
    read_sampling_defaults,
    task_of,
)
from llm_runtime.actors.tokenizer.chat_template import ChatTemplate
from llm_runtime.runtime.encoder_plan import EncoderPlan, check_keys, plan_encoder
from llm_runtime.runtime.engine_plan import EnginePlan, plan_engine, share_arenas
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.models import NotLocal, ResolvedModel, resolve_model
from llm_runtime.runtime.placement import Placement
from llm_runtime.runtime.progress import TellNote
from llm_runtime.runtime.topology import LoadedTopology, Model


@dataclass(frozen=True)
class ModelPlan:
    """One model.

    Attributes:
        key: its table in the topology, `model` or `model.INDEX`.
        settings: what stands there.
        model: where its files are.
        served_name: what clients, engines and the bootstrap server call it.
        task: what it is for.
        sampling: how tokens are drawn for requests that do not say it.
        max_model_len: most tokens of one request, prompt and output together.
        engines: those of all nodes, if it generates. encoders: those if it does not.
        tokenizer, detokenizer: names of the actors that have its vocabulary.
    """

    key: str
    settings: Model
    model: ResolvedModel
    served_name: str
    task: Task
    config: ModelConfig | PoolingConfig
    chat_template: Path | None
    sampling: SamplingDefaults
    max_model_len: int
    engines: list[EnginePlan]
    encoders: list[EncoderPlan]
    tokenizer: str
    detokenizer: str


def plan_model(
    loaded: LoadedTopology,
    index: int,
    threads: int,
    placement: Placement,
    download: bool,
    note: TellNote,
) -> ModelPlan:
    """Finds one model and fits its engines to it; as `plan_node`.

    Args:
        index: its place in the topology.
        threads: of a process that computes, where the topology does not say.
    """
    topology = loaded.topology
    settings, key = topology.models[index], topology.model_key(index)
    try:
        model = resolve_model(settings.path, loaded.base_of(f"{key}.path"), download, note)
    except NotLocal:
        raise
    except UserError as error:
        raise loaded.error(f"{key}.path", str(error)) from None
    task, config = _task(loaded, index, model)
    names = topology.engines_of(index)
    max_model_len = _max_model_len(loaded, index, config)
    engines: list[EnginePlan] = []
    encoders: list[EncoderPlan] = []
    if isinstance(config, ModelConfig):
        each = [plan_engine(loaded, name, config, settings, key, threads) for name in names]
        engines = share_arenas(each, topology, placement)
    else:
        check_keys(loaded, task, key, names)
        encoders = [plan_encoder(loaded, name, config, settings, key, model, max_model_len, threads) for name in names]
    owner = f"model{index}." if topology.array else ""
    return ModelPlan(
        key=key,
        settings=settings,
        model=model,
        served_name=settings.served_name or model.name,
        task=task,
        config=config,
        chat_template=_chat_template(loaded, index),
        sampling=_sampling(loaded, index, model, task),
        max_model_len=max_model_len,
        engines=engines,
        encoders=encoders,
        tokenizer=f"{owner}tokenizer",
        detokenizer=f"{owner}detokenizer",
    )


def _task(loaded: LoadedTopology, index: int, model: ResolvedModel) -> tuple[Task, ModelConfig | PoolingConfig]:
    """What the model is for, and its configuration for that."""
    wanted = loaded.topology.models[index].task
    key = loaded.topology.model_key(index, "path" if wanted == "auto" else "task")
    try:
        task = task_of(model.path) if wanted == "auto" else wanted
        return task, read_config(model.path) if task == "generate" else read_pooling_config(model.path, task)
    except CheckpointError as error:
        raise loaded.error(key, str(error)) from None


def _sampling(loaded: LoadedTopology, index: int, model: ResolvedModel, task: Task) -> SamplingDefaults:
    settings, defaults = loaded.topology.samplings[index], SamplingDefaults()
    if settings.defaults == "model" and task == "generate":
        try:
            defaults = model.sampling or read_sampling_defaults(model.path)
        except CheckpointError as error:
            raise loaded.error(loaded.topology.model_key(index, "path"), str(error)) from None
    given = {name: getattr(settings, name) for name in SamplingDefaults.__struct_fields__}
    return msgspec.structs.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _max_model_len(loaded: LoadedTopology, index: int, config: ModelConfig | PoolingConfig) -> int:
    topology = loaded.topology
    wanted = topology.models[index].max_model_len
    if wanted is None and isinstance(config, PoolingConfig):
        return config.max_length
    if wanted is None:
        return min(config.max_position, *(engine.kv_tokens for engine in topology.engines_of(index).values()))
    if wanted > config.max_position:
        raise loaded.error(
            topology.model_key(index, "max_model_len"),
            f"is {wanted}, and the model's own limit is {config.max_position} tokens; give at most that, or none",
        )
    return wanted


def _chat_template(loaded: LoadedTopology, index: int) -> Path | None:
    given, key = loaded.topology.models[index].chat_template, loaded.topology.model_key(index, "chat_template")
    if given is None:
        return None
    path = Path(os.path.abspath(loaded.base_of(key) / Path(given).expanduser()))
    if not path.is_file():
        raise loaded.error(key, f"there is no file {path}; give a Jinja file or remove the key")
    try:
        ChatTemplate({"default": path.read_text("utf-8-sig")}, {})
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise loaded.error(key, f"{path} is no Jinja template ({error}); mend it or remove the key") from None
    return path
