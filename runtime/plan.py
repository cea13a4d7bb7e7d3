"""Everything that is decided before a node starts: the model, sizes, names, addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from actors.actor import StartFailure
from actors.checkpoint import CheckpointError, ModelConfig, read_config
from actors.dtypes import WeightDType, compute_dtype
from actors.kv_format import KVDType, KVFormat
from actors.rank.precision import auto_dtype
from actors.rank.shard import kv_format, shard_of, weight_bytes
from actors.scheduler.pages import page_ledger_bytes
from runtime.errors import UserError
from runtime.models import NotLocal, ResolvedModel, resolve_model
from runtime.nodes import Placement, place
from runtime.topology import Engine, LoadedTopology, Topology


@dataclass(frozen=True)
class EnginePlan:
    """One engine, with the sizes that follow from its model.

    Attributes:
        dtype: of the weights. kv_dtype: of cached keys and values.
        num_pages: pages of the KV pool.
        threads: of each rank.
        formats: of each rank's pages. heads: the model's key-value heads [first, end) that they hold.
        weight_arenas, kv_arenas: names of each rank's arenas, which engines may share.
        weight_bytes, kv_bytes: their sizes.
        ledger_bytes: size of the arena of the scheduler's page ledger.
        shared_kv: prefill and decode engines compute in the same arenas.
        first_page: the engine's first page in its ranks' arenas. arena_pages: pages of these arenas.
    """

    name: str
    settings: Engine
    dtype: WeightDType
    kv_dtype: KVDType
    num_pages: int
    threads: int
    formats: list[KVFormat]
    heads: list[tuple[int, int]]
    weight_arenas: list[str]
    weight_bytes: list[int]
    kv_arenas: list[str]
    kv_bytes: list[int]
    ledger_bytes: int
    shared_kv: bool = False
    first_page: int = 0
    arena_pages: int = 0

    @property
    def role(self) -> str:
        return self.settings.role

    @property
    def rank_names(self) -> list[str]:
        return [f"{self.name}.rank{rank}" for rank in range(self.settings.tp)]

    @property
    def scheduler(self) -> str:
        return f"{self.name}.scheduler"

    @property
    def grammar(self) -> str:
        return f"{self.name}.grammar"

    @property
    def transfer_actor(self) -> str:
        """The KV sender of a prefill engine, the KV receiver of a decode engine, nobody in a unified one."""
        actor = {"prefill": "kv_sender", "decode": "kv_receiver"}.get(self.role)
        return f"{self.name}.{actor}" if actor else ""


@dataclass(frozen=True)
class NodePlan:
    """One node.

    Attributes:
        url: where clients on this machine reach it; empty if the ingress is on another one.
        engines: those of all nodes.
        placement: which of them, and of the other actors, live here.
        max_model_len: most tokens of one request, prompt and output together.
    """

    name: str
    url: str
    topology: Topology
    file: Path
    model: ResolvedModel
    served_name: str
    config: ModelConfig
    chat_template: Path | None
    max_model_len: int
    api_key: str | None
    engines: list[EnginePlan]
    placement: Placement


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
    try:
        config = read_config(model.path)
    except CheckpointError as error:
        raise loaded.error("model.path", str(error)) from None
    here = [engine for name, engine in topology.engine.items() if placement.is_here(name)]
    ranks = sum(engine.tp for engine in here if engine.device == "cpu")
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, ranks))
    engines = _share_arenas(
        [_plan_engine(loaded, name, config, threads) for name in topology.engine], topology, placement
    )
    if node is not None or not placement.machines:
        on_cpu = [engine for engine in engines if engine.settings.device == "cpu"]
        _check_memory(loaded, [engine for engine in on_cpu if placement.is_here(engine.name)])
    return NodePlan(
        name=_name(loaded, node),
        url=_url(topology.ingress.host, topology.ingress.port) if placement.is_here("ingress") else "",
        topology=topology,
        file=loaded.file,
        model=model,
        served_name=topology.model.served_name or model.name,
        config=config,
        chat_template=_chat_template(loaded),
        max_model_len=_max_model_len(loaded, config),
        api_key=topology.ingress.api_key or os.environ.get("RUNTIME_API_KEY") or None,
        engines=engines,
        placement=placement,
    )


def _name(loaded: LoadedTopology, node: str | None) -> str:
    topology = loaded.topology
    if node is not None:
        return f"{topology.node.name or loaded.file.stem}-{node}"
    return topology.node.name or f"{loaded.file.stem}-{topology.ingress.port}"


def _plan_engine(loaded: LoadedTopology, name: str, config: ModelConfig, threads: int) -> EnginePlan:
    engine = loaded.topology.engine[name]
    dtype = loaded.topology.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if engine.device == "cuda" else auto_dtype(config)
    kv_dtype = compute_dtype(dtype) if engine.kv_dtype == "auto" else engine.kv_dtype
    num_pages = -(-engine.kv_tokens // engine.page_size)
    try:
        formats = [kv_format(config, kv_dtype, engine.page_size, engine.tp, rank) for rank in range(engine.tp)]
        heads = [shard_of(config, engine.tp, rank).kv_heads for rank in range(engine.tp)]
        weights = [weight_bytes(config, dtype, engine.tp, rank) for rank in range(engine.tp)]
    except StartFailure as failure:
        raise loaded.error(f"engine.{name}.tp", str(failure)) from None
    return EnginePlan(
        name=name,
        settings=engine,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_pages=num_pages,
        threads=engine.threads or threads,
        formats=formats,
        heads=[(each.start, each.stop) for each in heads],
        weight_arenas=[f"{name}.rank{rank}.weights" for rank in range(engine.tp)],
        weight_bytes=weights,
        kv_arenas=[f"{name}.rank{rank}.kv" for rank in range(engine.tp)],
        kv_bytes=[num_pages * each.page_bytes for each in formats],
        ledger_bytes=page_ledger_bytes(num_pages, engine.page_size),
        arena_pages=num_pages,
    )


def _share_arenas(engines: list[EnginePlan], topology: Topology, placement: Placement) -> list[EnginePlan]:
    """Gives engines on the CPU of a node that hold the same weights the same arena of them, and, where nothing stands
    against it, prefill engines the KV arenas of the decode engines: these then have their pages one after the
    other in them."""
    first: dict[tuple[str, str, int], EnginePlan] = {}
    shared = []
    for engine in engines:
        if engine.settings.device == "cpu":
            holds = placement.node_of(engine.name), engine.dtype, engine.settings.tp
            engine = replace(engine, weight_arenas=first.setdefault(holds, engine).weight_arenas)
        shared.append(engine)
    apart = [engine for engine in shared if engine.role != "unified"]
    if not apart or topology.transfer.engine != "shm" or len({engine.settings.tp for engine in apart}) > 1:
        return shared
    owners = [engine for engine in apart if engine.role == "decode"]
    total = sum(engine.num_pages for engine in owners)
    ends = accumulate(engine.num_pages for engine in owners)
    starts = {engine.name: end - engine.num_pages for engine, end in zip(owners, ends, strict=True)}
    return [
        engine
        if engine.role == "unified"
        else replace(
            engine,
            kv_arenas=owners[0].kv_arenas,
            kv_bytes=[total * each.page_bytes for each in engine.formats],
            num_pages=engine.num_pages if engine.role == "decode" else total,
            ledger_bytes=engine.ledger_bytes
            if engine.role == "decode"
            else page_ledger_bytes(total, engine.settings.page_size),
            shared_kv=True,
            first_page=starts.get(engine.name, 0),
            arena_pages=total,
        )
        for engine in shared
    ]


def arena_sizes_of(engines: Sequence[EnginePlan]) -> dict[str, int]:
    """Bytes of the arenas of weights and KV pages of engines on the CPU, by name."""
    return {
        name: size
        for engine in engines
        for name, size in zip(
            (*engine.weight_arenas, *engine.kv_arenas), (*engine.weight_bytes, *engine.kv_bytes), strict=True
        )
        if engine.settings.device == "cpu"
    }


def _check_memory(loaded: LoadedTopology, engines: Sequence[EnginePlan]) -> None:
    """Raises TopologyError unless this machine's memory can hold weights and KV pools, which are used up to the last
    byte under load."""
    memory = _memory_bytes()
    needed = sum(arena_sizes_of(engines).values())
    if needed <= memory:
        return
    largest = max(engines, key=lambda engine: sum(engine.kv_bytes))
    pool = sum(largest.kv_bytes)
    page = pool // largest.num_pages
    left = (memory - (needed - pool)) // page * largest.settings.page_size
    problem = f"needs {needed / 2**30:.1f} GiB for weights and KV pools, and this machine has {memory / 2**30:.1f} GiB"
    if left < largest.settings.page_size:
        smaller = "" if largest.dtype == "int4" else ', or model.dtype = "int4"'
        raise loaded.error("model.path", f"{problem}; choose a smaller model{smaller}")
    key = f"engine.{largest.name}.kv_tokens"
    raise loaded.error(key, f"is {largest.settings.kv_tokens}, which {problem}; give at most {left}")


def _memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's if that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return memory


def _max_model_len(loaded: LoadedTopology, config: ModelConfig) -> int:
    topology = loaded.topology
    wanted = topology.model.max_model_len
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
    return path


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
