"""Everything that is decided before a node starts: the model, sizes, names, addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.actor import StartFailure
from actors.checkpoint import CheckpointError, ModelConfig, read_config
from actors.dtypes import WeightDType, compute_dtype
from actors.kv_format import KVDType
from actors.rank.precision import auto_dtype
from actors.rank.shard import kv_format, weight_bytes
from actors.scheduler.pages import page_ledger_bytes
from runtime.errors import UserError
from runtime.models import NotLocal, ResolvedModel, resolve_model
from runtime.topology import Engine, LoadedTopology, Topology


@dataclass(frozen=True)
class EnginePlan:
    """One engine, with the sizes that follow from its model.

    Attributes:
        dtype: of the weights. kv_dtype: of cached keys and values.
        num_pages: pages of the KV pool.
        threads: of each rank.
        weight_bytes, kv_bytes: sizes of each rank's arenas.
        ledger_bytes: size of the arena of the scheduler's page ledger.
    """

    name: str
    settings: Engine
    dtype: WeightDType
    kv_dtype: KVDType
    num_pages: int
    threads: int
    weight_bytes: list[int]
    kv_bytes: list[int]
    ledger_bytes: int


@dataclass(frozen=True)
class NodePlan:
    """One node.

    Attributes:
        url: where clients on this machine reach it.
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


def plan_node(loaded: LoadedTopology, download: bool = True, note: Callable[[str], None] = lambda _: None) -> NodePlan:
    """Finds the model and fits the topology to it.

    Args:
        download: fetch a model that is not on this machine; otherwise raise NotLocal.
        note: told what takes long.

    Raises TopologyError, or UserError when the model cannot be had.
    """
    topology = loaded.topology
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
    ranks = sum(engine.tp for engine in topology.engine.values() if engine.device == "cpu")
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, ranks))
    engines = [_plan_engine(loaded, name, config, threads) for name in topology.engine]
    _check_memory(loaded, [engine for engine in engines if engine.settings.device == "cpu"])
    return NodePlan(
        name=topology.node.name or f"{loaded.file.stem}-{topology.ingress.port}",
        url=_url(topology.ingress.host, topology.ingress.port),
        topology=topology,
        file=loaded.file,
        model=model,
        served_name=topology.model.served_name or model.name,
        config=config,
        chat_template=_chat_template(loaded),
        max_model_len=_max_model_len(loaded, config),
        api_key=topology.ingress.api_key or os.environ.get("RUNTIME_API_KEY") or None,
        engines=engines,
    )


def _plan_engine(loaded: LoadedTopology, name: str, config: ModelConfig, threads: int) -> EnginePlan:
    engine = loaded.topology.engine[name]
    dtype = loaded.topology.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if engine.device == "cuda" else auto_dtype(config)
    kv_dtype = compute_dtype(dtype) if engine.kv_dtype == "auto" else engine.kv_dtype
    num_pages = -(-engine.kv_tokens // engine.page_size)
    try:
        formats = [kv_format(config, kv_dtype, engine.page_size, engine.tp, rank) for rank in range(engine.tp)]
        weights = [weight_bytes(config, dtype, engine.tp, rank) for rank in range(engine.tp)]
    except StartFailure as failure:
        key = "kv_dtype" if "kv_dtype" in str(failure) else "tp"
        raise loaded.error(f"engine.{name}.{key}", str(failure)) from None
    return EnginePlan(
        name=name,
        settings=engine,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_pages=num_pages,
        threads=engine.threads or threads,
        weight_bytes=weights,
        kv_bytes=[num_pages * each.page_bytes for each in formats],
        ledger_bytes=page_ledger_bytes(num_pages, engine.page_size),
    )


def _check_memory(loaded: LoadedTopology, engines: Sequence[EnginePlan]) -> None:
    """Raises TopologyError unless this machine's memory can hold weights and KV pools, which are used up to the last
    byte under load."""
    memory = _memory_bytes()
    needed = sum(sum(engine.weight_bytes) + sum(engine.kv_bytes) for engine in engines)
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
