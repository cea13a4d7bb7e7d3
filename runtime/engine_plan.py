"""Engines as they are decided before a node starts: sizes, names of arenas, and which engines share them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.actors.dtypes import WeightDType, compute_dtype
from llm_runtime.actors.grammar import missing
from llm_runtime.actors.kv_format import KVDType, KVFormat
from llm_runtime.actors.rank.quantization_policy import auto_dtype
from llm_runtime.actors.rank.shard import kv_format, shard_of, weight_bytes
from llm_runtime.actors.scheduler.pages import page_ledger_bytes
from llm_runtime.runtime.placement import Placement
from llm_runtime.runtime.topology import Engine, LoadedTopology, Model, Topology


@dataclass(frozen=True)
class EnginePlan:
    """One engine, with the sizes that follow from its model.

    Attributes:
        model_key: the table of its model in the topology.
        dtype: of the weights. kv_dtype: of cached keys and values.
        num_pages: pages of the KV pool.
        threads: of each rank.
        formats: of each rank's pages. heads: the key-value heads [first, end) that they hold: the model's
            heads, or, where all ranks hold the same, one.
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
    model_key: str = "model"

    @property
    def role(self) -> Literal["unified", "prefill", "decode"]:
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
    def grammar_backend(self) -> Literal["llguidance", "xgrammar"]:
        chosen = self.settings.grammar_backend
        return "llguidance" if chosen == "auto" else chosen

    @property
    def transfer_actor(self) -> str:
        """The KV sender of a prefill engine, the KV receiver of a decode engine, nobody in a unified one."""
        actor = {"prefill": "kv_sender", "decode": "kv_receiver"}.get(self.role)
        return f"{self.name}.{actor}" if actor else ""


def plan_engine(
    loaded: LoadedTopology, name: str, config: ModelConfig, model: Model, model_key: str, threads: int
) -> EnginePlan:
    """One engine with arenas of its own. Raises TopologyError for what the model does not allow.

    Args:
        model: its model. model_key: the model's table.
        threads: of a rank, where the topology does not say.
    """
    engine = loaded.topology.engine[name]
    if engine.grammar_backend != "auto" and missing(engine.grammar_backend):
        raise loaded.error(f"engine.{name}.grammar_backend", missing(engine.grammar_backend))
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if engine.device == "cuda" else auto_dtype(config)
    kv_dtype = compute_dtype(dtype) if engine.kv_dtype == "auto" else engine.kv_dtype
    num_pages = -(-engine.kv_tokens // engine.page_size)
    try:
        formats = [kv_format(config, kv_dtype, engine.page_size, engine.tp, rank) for rank in range(engine.tp)]
        heads = [
            range(1) if each.replicated else shard_of(config, engine.tp, rank).kv_heads
            for rank, each in enumerate(formats)
        ]
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
        formats=formats,
        heads=[(each.start, each.stop) for each in heads],
        weight_arenas=[f"{name}.rank{rank}.weights" for rank in range(engine.tp)],
        weight_bytes=weights,
        kv_arenas=[f"{name}.rank{rank}.kv" for rank in range(engine.tp)],
        kv_bytes=[num_pages * each.page_bytes for each in formats],
        ledger_bytes=page_ledger_bytes(num_pages, engine.page_size),
        arena_pages=num_pages,
        model_key=model_key,
    )


def share_arenas(engines: list[EnginePlan], topology: Topology, placement: Placement) -> list[EnginePlan]:
    """Gives engines of one model on the CPU of a node that hold the same weights the same arena of them, and, where
    nothing stands against it, prefill engines the KV arenas of the decode engines: these then have their pages one
    after the other in them."""
    first: dict[tuple[str, str, int], EnginePlan] = {}
    shared = []
    for engine in engines:
        if engine.settings.device == "cpu":
            holds = placement.node_of(engine.name), engine.dtype, engine.settings.tp
            engine = replace(engine, weight_arenas=first.setdefault(holds, engine).weight_arenas)
        shared.append(engine)
    apart = [engine for engine in shared if engine.role != "unified"]
    if not apart or topology.transfer_engine != "shm" or len({engine.settings.tp for engine in apart}) > 1:
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
