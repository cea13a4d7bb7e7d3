"""Everything that is decided before a node starts: the model, sizes, names, addresses."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from actors.checkpoint import (
    CheckpointError,
    ModelConfig,
    PoolingConfig,
    Task,
    read_config,
    read_pooling_config,
    task_of,
)
from actors.tokenizer.chat_template import ChatTemplate
from runtime.encoder_plan import EncoderPlan, check_keys, plan_encoder
from runtime.engine_plan import EnginePlan, plan_engine, share_arenas
from runtime.errors import UserError
from runtime.models import NotLocal, ResolvedModel, resolve_model
from runtime.needs import check_needs
from runtime.nodes import Placement, place
from runtime.topology import LoadedTopology, Topology


@dataclass(frozen=True)
class NodePlan:
    """One node.

    Attributes:
        url: where clients on this machine reach it; empty if the ingress is on another one.
        task: what the model is for.
        engines: those of all nodes, if it generates. encoders: those if it does not.
        placement: which of them, and of the other actors, live here.
        max_model_len: most tokens of one request, prompt and output together.
    """

    name: str
    url: str
    topology: Topology
    file: Path
    model: ResolvedModel
    served_name: str
    task: Task
    config: ModelConfig | PoolingConfig
    chat_template: Path | None
    max_model_len: int
    api_key: str | None
    engines: list[EnginePlan]
    encoders: list[EncoderPlan]
    placement: Placement
    crash_dump_dir: Path | None = None


def plan_node(
    loaded: LoadedTopology,
    download: bool = True,
    note: Callable[[str], None] = lambda _: None,
    node: str | None = None,
) -> NodePlan:
    """Finds the model and fits the topology to it.

    Args:
        download: fetch a model that is not on this machine; otherwise raise NotLocal.
        note: told what takes long.
        node: the one of several nodes that is started; by default a topology of several is only looked at.

    Raises TopologyError, or UserError when the model cannot be had.
    """
    topology = loaded.topology
    placement = place(loaded, node)
    try:
        model = resolve_model(topology.model.path, loaded.base_of("model.path"), download, note)
    except NotLocal:
        raise
    except UserError as error:
        raise loaded.error("model.path", str(error)) from None
    if topology.tracing.endpoint and placement.is_here("ingress") and not _can_trace():
        problem = 'needs OpenTelemetry, which is not installed: pip install "llm-runtime[otel]", or remove the key'
        raise loaded.error("tracing.endpoint", problem)
    task, config = _task(loaded, model)
    here = [engine for name, engine in topology.engine.items() if placement.is_here(name)]
    ranks = sum(engine.tp for engine in here if engine.device == "cpu")
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, ranks))
    max_model_len = _max_model_len(loaded, config)
    engines: list[EnginePlan] = []
    encoders: list[EncoderPlan] = []
    if isinstance(config, ModelConfig):
        engines = share_arenas(
            [plan_engine(loaded, name, config, threads) for name in topology.engine], topology, placement
        )
    else:
        check_keys(loaded, task)
        encoders = [plan_encoder(loaded, name, config, model, max_model_len, threads) for name in topology.engine]
    if node is not None or not placement.machines:
        check_needs(
            loaded,
            [engine for engine in engines if placement.is_here(engine.name)],
            [engine for engine in encoders if placement.is_here(engine.name)],
        )
    return NodePlan(
        name=_name(loaded, node),
        url=_url(topology.ingress.host, topology.ingress.port) if placement.is_here("ingress") else "",
        topology=topology,
        file=loaded.file,
        model=model,
        served_name=topology.model.served_name or model.name,
        task=task,
        config=config,
        chat_template=_chat_template(loaded),
        max_model_len=max_model_len,
        api_key=topology.ingress.api_key or os.environ.get("RUNTIME_API_KEY") or None,
        engines=engines,
        encoders=encoders,
        placement=placement,
        crash_dump_dir=_crash_dump_dir(loaded),
    )


def _can_trace() -> bool:
    """Whether the libraries of the extra `otel` are there. Others may have installed a part of them."""
    try:
        return all(
            importlib.util.find_spec(each) for each in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
        )
    except ModuleNotFoundError:
        return False


def _crash_dump_dir(loaded: LoadedTopology) -> Path | None:
    given = loaded.topology.node.crash_dump_dir
    if given is None:
        return None
    return Path(os.path.abspath(loaded.base_of("node.crash_dump_dir") / Path(given).expanduser()))


def _name(loaded: LoadedTopology, node: str | None) -> str:
    topology = loaded.topology
    if node is not None:
        return f"{topology.node.name or loaded.file.stem}-{node}"
    return topology.node.name or f"{loaded.file.stem}-{topology.ingress.port}"


def _task(loaded: LoadedTopology, model: ResolvedModel) -> tuple[Task, ModelConfig | PoolingConfig]:
    """What the model is for, and its configuration for that."""
    wanted = loaded.topology.model.task
    key = "model.path" if wanted == "auto" else "model.task"
    try:
        task = task_of(model.path) if wanted == "auto" else wanted
        return task, read_config(model.path) if task == "generate" else read_pooling_config(model.path, task)
    except CheckpointError as error:
        raise loaded.error(key, str(error)) from None


def _max_model_len(loaded: LoadedTopology, config: ModelConfig | PoolingConfig) -> int:
    topology = loaded.topology
    wanted = topology.model.max_model_len
    if wanted is None and isinstance(config, PoolingConfig):
        return config.max_length
    if wanted is None:
        return min(config.max_position, *(engine.kv_tokens for engine in topology.engine.values()))
    if wanted > config.max_position:
        raise loaded.error(
            "model.max_model_len",
            f"is {wanted}, and the model's own limit is {config.max_position} tokens; give at most that, or none",
        )
    return wanted


def _chat_template(loaded: LoadedTopology) -> Path | None:
    given = loaded.topology.model.chat_template
    if given is None:
        return None
    path = Path(os.path.abspath(loaded.base_of("model.chat_template") / Path(given).expanduser()))
    if not path.is_file():
        raise loaded.error("model.chat_template", f"there is no file {path}; give a Jinja file or remove the key")
    try:
        ChatTemplate({"default": path.read_text("utf-8")}, {})
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        problem = f"{path} is no Jinja template ({error}); mend it or remove the key"
        raise loaded.error("model.chat_template", problem) from None
    return path


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
