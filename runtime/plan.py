"""Everything that is decided before a node starts: models, sizes, names, addresses."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from llm_runtime.runtime.api_keys import key_from
from llm_runtime.runtime.cgroups import cpu_count
from llm_runtime.runtime.encoder_plan import EncoderPlan
from llm_runtime.runtime.engine_plan import EnginePlan
from llm_runtime.runtime.model_plan import ModelPlan, plan_model
from llm_runtime.runtime.placement import Placement, place
from llm_runtime.runtime.progress import TellNote, no_notes
from llm_runtime.runtime.resource_check import check_needs
from llm_runtime.runtime.topology import LoadedTopology, Topology


@dataclass(frozen=True)
class NodePlan:
    """One node.

    Attributes:
        url: where clients on this machine reach it; empty if the ingress is on another one.
        models: what is served, at least one.
        placement: which of their engines, and of the other actors, live here.
    """

    name: str
    url: str
    topology: Topology
    file: Path
    models: list[ModelPlan]
    api_key: str | None
    placement: Placement
    crash_dump_dir: Path | None = None
    admin_api_key: str | None = None
    profile_dir: Path | None = None

    @property
    def is_open(self) -> bool:
        """Everybody who reaches an interface of this machine may ask."""
        return self.api_key is None and not is_loopback(self.topology.ingress.host)

    @property
    def engines(self) -> list[EnginePlan]:
        """Those of all models that generate."""
        return [engine for model in self.models for engine in model.engines]

    @property
    def encoders(self) -> list[EncoderPlan]:
        """Those of all models that embed or classify."""
        return [encoder for model in self.models for encoder in model.encoders]


def plan_node(
    loaded: LoadedTopology,
    download: bool = True,
    note: TellNote = no_notes,
    node: str | None = None,
) -> NodePlan:
    """Finds the models and fits the topology to them.

    Args:
        download: fetch a model that is not on this machine; otherwise raise NotLocal.
        note: told what takes long.
        node: the one of several nodes that is started; by default a topology of several is only looked at.

    Raises TopologyError, or UserError when the model cannot be had.
    """
    topology = loaded.topology
    placement = place(loaded, node)
    if topology.tracing.endpoint and placement.is_here("ingress") and not _can_trace():
        install = "`pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http`"
        problem = f"needs OpenTelemetry, which is not installed: run {install}, or remove the key"
        raise loaded.error("tracing.endpoint", problem)
    here = [engine for name, engine in topology.engine.items() if placement.is_here(name)]
    ranks = sum(engine.tp for engine in here if engine.device == "cpu")
    threads = max(1, cpu_count() // max(1, ranks))
    models = [plan_model(loaded, index, threads, placement, download, note) for index in range(len(topology.models))]
    if node is not None or not placement.machines:
        check_needs(
            loaded,
            [engine for model in models for engine in model.engines if placement.is_here(engine.name)],
            [engine for model in models for engine in model.encoders if placement.is_here(engine.name)],
        )
    api_key = topology.ingress.api_key or key_from("RUNTIME_API_KEY")
    admin_api_key = topology.ingress.admin_api_key or key_from("RUNTIME_ADMIN_API_KEY")
    if api_key is not None and api_key == admin_api_key:
        problem = "is the clients' key too, so every client would be an administrator: give another one"
        raise loaded.error("ingress.admin_api_key", problem)
    return NodePlan(
        name=_name(loaded, node),
        url=_url(topology.ingress.host, topology.ingress.port) if placement.is_here("ingress") else "",
        topology=topology,
        file=loaded.file,
        models=models,
        api_key=api_key,
        placement=placement,
        crash_dump_dir=_directory(loaded, "node.crash_dump_dir", topology.node.crash_dump_dir),
        admin_api_key=admin_api_key,
        profile_dir=_directory(loaded, "node.profile_dir", topology.node.profile_dir),
    )


def _can_trace() -> bool:
    """Whether the libraries of the extra `otel` are there. Others may have installed a part of them."""
    try:
        return all(
            importlib.util.find_spec(each) for each in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
        )
    except ModuleNotFoundError:
        return False


def _directory(loaded: LoadedTopology, key: str, given: str | None) -> Path | None:
    if given is None:
        return None
    return Path(os.path.abspath(loaded.base_of(key) / Path(given).expanduser()))


def is_loopback(host: str) -> bool:
    """Whether only clients on this machine reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _name(loaded: LoadedTopology, node: str | None) -> str:
    topology = loaded.topology
    if node is not None:
        return f"{topology.node.name or loaded.file.stem}-{node}"
    return topology.node.name or f"{loaded.file.stem}-{topology.ingress.port}"


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
