"""The supervision tree of a node: which actor is started where, with which settings, memory and peers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
from msgspec import structs

from llm_runtime.actors.actor import ActorArgs
from llm_runtime.actors.checkpoint import PoolingConfig, checkpoint_facts
from llm_runtime.actors.detokenizer import DetokenizerConfig
from llm_runtime.actors.encoder import EncoderConfig
from llm_runtime.actors.grammar.actor import GrammarConfig
from llm_runtime.actors.ingress.config import IngressConfig, ServedModel
from llm_runtime.actors.ingress.journal import slot_bytes
from llm_runtime.actors.ingress.tracing import TracingConfig
from llm_runtime.actors.kv_pages import RankPages
from llm_runtime.actors.kv_receiver import ReceiverConfig
from llm_runtime.actors.kv_sender import SenderConfig
from llm_runtime.actors.rank import RankConfig
from llm_runtime.actors.scheduler.config import Config as SchedulerConfig
from llm_runtime.actors.tokenizer import TokenizerConfig
from llm_runtime.runtime.encoder_plan import EncoderPlan
from llm_runtime.runtime.engine_plan import EnginePlan
from llm_runtime.runtime.model_plan import ModelPlan
from llm_runtime.runtime.output_formats import output_formats
from llm_runtime.runtime.placement import ip_address, part_of
from llm_runtime.runtime.plan import NodePlan, is_loopback
from llm_runtime.runtime.resource_check import arena_sizes_of
from llm_runtime.runtime.status_socket import NAME as STATUS_SOCKET
from llm_runtime.supervisors.spec import ChildSpec, SupervisorSpec
from llm_runtime.transport import Faults
from llm_runtime.transport.transfer import TransferSettings
from llm_runtime.transport.transfer.create import TransferKind

LISTENER = "listener"
"""Name of the descriptor of the HTTP listening socket."""
MAX_JOURNALLED = 2**14
"""Connections of one ingress worker that outlive it while they have a request, at most."""
_SCHEDULERS = {"unified": "actor:Scheduler", "prefill": "prefill:PrefillScheduler", "decode": "decode:DecodeScheduler"}
_STOP_MARGIN_S = 5.0
"""What an ingress may take to stop beyond the time it has for running answers."""


def arena_sizes(plan: NodePlan) -> dict[str, int]:
    """Bytes of each memory file of a node, by descriptor name."""
    ingress = plan.topology.ingress
    slots = min(2 * ingress.max_concurrent, MAX_JOURNALLED)
    sizes = {_journal(name): slots * slot_bytes(ingress.max_body_bytes) for name in _ingress_names(plan)}
    ledgers = {f"{engine.name}.pages": engine.ledger_bytes for engine in plan.engines}
    sizes |= ledgers | arena_sizes_of(plan.engines)
    sizes |= {each.weights_arena: each.weight_bytes for each in plan.encoders if each.weights_arena}
    return {name: size for name, size in sizes.items() if plan.placement.is_here(name)}


def actor_names(plan: NodePlan) -> list[str]:
    """Names of all workers, those of other nodes among them."""
    engines = [
        name
        for engine in plan.engines
        for name in (*engine.rank_names, engine.transfer_actor, engine.scheduler, engine.grammar)
        if name
    ]
    encoders = [each.actor for each in plan.encoders]
    ingresses = _ingress_names(plan)
    detokenizers = [model.detokenizer for model in plan.models if model.engines]
    tokenizers = [model.tokenizer for model in plan.models]
    return [*(["bootstrap"] if engines else []), *engines, *encoders, *detokenizers, *tokenizers, *ingresses]


def build_tree(plan: NodePlan, run_dir: Path) -> SupervisorSpec:
    """The specification that the root runs.

    root ─ bootstrap, one supervisor an engine (its ranks, which restart together, its KV sender or receiver if it only
    prefills or decodes, its scheduler, and its grammar actor), each model's detokenizer and tokenizer, and the HTTP
    workers. An engine that embeds or classifies has but an encoder; where there are only such,
    bootstrap and detokenizer have nothing to do and are left out. With several nodes, what of this lives on this one.
    """
    return part_of(_Builder(plan, run_dir).root(), plan.placement, epoch=time.time_ns() // 1_000_000)


def _ingress_names(plan: NodePlan) -> list[str]:
    return [f"ingress{number}" for number in range(plan.topology.ingress.workers)]


def _journal(ingress: str) -> str:
    return f"{ingress}.journal"


def _allowed_hosts(plan: NodePlan) -> list[str] | None:
    """Names by which clients may ask for the server, None for any."""
    ingress = plan.topology.ingress
    if ingress.allowed_hosts is None and (plan.api_key is not None or not is_loopback(ingress.host)):
        return None
    return [*(ingress.allowed_hosts or []), ingress.host]


def _of_role(model: ModelPlan, role: str) -> list[EnginePlan]:
    return [engine for engine in model.engines if engine.role == role]


def _rank_pages(engine: EnginePlan) -> list[RankPages]:
    return [RankPages(*each) for each in zip(engine.kv_arenas, engine.formats, engine.heads, strict=True)]


class _Builder:
    def __init__(self, plan: NodePlan, run_dir: Path) -> None:
        self.plan = plan
        self.run_dir = run_dir
        self.supervision = plan.topology.supervision
        self.addresses = {name: f"ipc://{run_dir}/sockets/{name}" for name in actor_names(plan)}
        self.ingresses = _ingress_names(plan)
        public, secret = zmq.curve_keypair()
        self.own_keys = public.decode(), secret.decode()
        self.schedulers = [engine.scheduler for engine in plan.engines]

    def root(self) -> SupervisorSpec:
        return self._supervisor(
            [
                *([self._bootstrap()] if self.schedulers else []),
                *(self._engine(model, engine) for model in self.plan.models for engine in model.engines),
                *(self._encoder(model, engine) for model in self.plan.models for engine in model.encoders),
                *(self._detokenizer(model) for model in self.plan.models if model.engines),
                *(self._tokenizer(model) for model in self.plan.models),
                # Below a supervisor of their own, connections would be lost that were on their way up when it died.
                *(self._ingress(name) for name in self.ingresses),
            ]
        )

    def _bootstrap(self) -> ChildSpec:
        peers = [*self.ingresses, *self.schedulers]
        return self._worker("bootstrap", "bootstrap", "llm_runtime.actors.bootstrap:Bootstrap", peers=peers)

    def _detokenizer(self, model: ModelPlan) -> ChildSpec:
        serving = [engine.scheduler for engine in model.engines if engine.role != "prefill"]
        return self._worker(
            model.detokenizer,
            "detokenizer",
            "llm_runtime.actors.detokenizer:Detokenizer",
            peers=[*serving, *self.ingresses],
            config=DetokenizerConfig(model=str(model.model.path)),
        )

    def _tokenizer(self, model: ModelPlan) -> ChildSpec:
        template = str(model.chat_template) if model.chat_template else None
        return self._worker(
            model.tokenizer,
            "tokenizer",
            "llm_runtime.actors.tokenizer:Tokenizer",
            peers=self.ingresses,
            config=TokenizerConfig(model=str(model.model.path), chat_template=template),
        )

    def _encoder(self, model: ModelPlan, engine: EncoderPlan) -> ChildSpec:
        encoder = self._worker(
            engine.actor,
            "encoder",
            "llm_runtime.actors.encoder.actor:Encoder",
            peers=self.ingresses,
            descriptors=[engine.weights_arena] if engine.weights_arena else [],
            config=EncoderConfig(
                model=str(model.model.path),
                task="classify" if model.task == "classify" else "embed",
                dtype=engine.dtype,
                weights_arena=engine.weights_arena,
                max_model_len=model.max_model_len,
                chunk_tokens=engine.settings.chunk_tokens,
                max_queue=engine.settings.max_queue,
                threads=engine.threads,
            ),
        )
        return self._nested(engine.name, "engine", [encoder])

    def _engine(self, model: ModelPlan, engine: EnginePlan) -> ChildSpec:
        ranks = [self._rank(model, engine, rank) for rank in range(engine.settings.tp)]
        transfer = {"prefill": self._kv_sender, "decode": self._kv_receiver}.get(engine.role)
        return self._nested(
            engine.name,
            "engine",
            [
                self._nested(f"{engine.name}.ranks", "ranks", ranks, "one_for_all"),
                *([transfer(model, engine)] if transfer else []),
                self._scheduler(model, engine),
                self._grammar(model, engine),
            ],
        )

    def _rank(self, model: ModelPlan, engine: EnginePlan, rank: int) -> ChildSpec:
        name, settings = f"{engine.name}.rank{rank}", engine.settings
        on_cpu = settings.device == "cpu"
        return self._worker(
            name,
            "rank",
            "llm_runtime.actors.rank.actor:Rank",
            peers=[
                f"{engine.name}.scheduler",
                *(peer for peer in engine.rank_names if peer != name),
                *self.ingresses,
            ],
            descriptors=[engine.weight_arenas[rank], engine.kv_arenas[rank]] if on_cpu else [],
            config=RankConfig(
                model=str(model.model.path),
                dtype=engine.dtype,
                kv_dtype=engine.kv_dtype,
                deterministic=model.settings.deterministic,
                device=settings.device,
                rank=rank,
                tp=settings.tp,
                page_size=settings.page_size,
                num_pages=engine.arena_pages,
                weights_arena=engine.weight_arenas[rank] if on_cpu else "",
                kv_arena=engine.kv_arenas[rank] if on_cpu else "",
                max_slots=settings.max_running,
                max_model_len=model.max_model_len,
                max_step_tokens=settings.chunk_tokens + settings.max_running,
                threads=engine.threads,
                grammar_backend=engine.grammar_backend,
                process_group_dir=str(self.run_dir / "groups" / engine.name),
                profile_dir=str(self.plan.profile_dir or ""),
            ),
        )

    def _kv_sender(self, model: ModelPlan, engine: EnginePlan) -> ChildSpec:
        return self._worker(
            engine.transfer_actor,
            "kv_sender",
            "llm_runtime.actors.kv_sender:KvSender",
            peers=[engine.scheduler, *(each.transfer_actor for each in _of_role(model, "decode")), *self.ingresses],
            descriptors=engine.kv_arenas,
            config=SenderConfig(
                engine.scheduler, _rank_pages(engine), engine.arena_pages, self._transfer_settings(engine)
            ),
        )

    def _kv_receiver(self, model: ModelPlan, engine: EnginePlan) -> ChildSpec:
        copies = self.plan.topology.transfer_engine == "shm" and not engine.shared_kv
        sources = (
            list(dict.fromkeys(arena for each in _of_role(model, "prefill") for arena in each.kv_arenas))
            if copies
            else []
        )
        return self._worker(
            engine.transfer_actor,
            "kv_receiver",
            "llm_runtime.actors.kv_receiver:KvReceiver",
            peers=[engine.scheduler, *(each.transfer_actor for each in _of_role(model, "prefill")), *self.ingresses],
            descriptors=[*engine.kv_arenas, *sources],
            config=ReceiverConfig(
                engine.scheduler, _rank_pages(engine), engine.arena_pages, self._transfer_settings(engine), sources
            ),
        )

    def _transfer_settings(self, engine: EnginePlan) -> TransferSettings:
        settings, placement = self.plan.topology.transfer, self.plan.placement
        kind: TransferKind = "shared" if engine.shared_kv else self.plan.topology.transfer_engine
        found = TransferSettings(kind=kind, protocol=settings.protocol, device=settings.device)
        if placement.machines and kind in ("tcp", "mooncake", "nixl") and placement.is_here(engine.name):
            host = ip_address(placement.machines[placement.node_of(engine.name)].address)
            found = structs.replace(found, host=host)
        if kind == "tcp":
            # The deployment's keys, or on a single machine some that are made for this node's life.
            keys = placement.keys
            public, secret = self.own_keys if keys is None else (keys.public, keys.secret)
            found = structs.replace(found, public=public, secret=secret)
        return found

    def _grammar(self, model: ModelPlan, engine: EnginePlan) -> ChildSpec:
        return self._worker(
            engine.grammar,
            "grammar",
            "llm_runtime.actors.grammar:Grammar",
            peers=[engine.scheduler, *self.ingresses],
            config=GrammarConfig(
                model=str(model.model.path),
                vocab_size=model.config.vocab_size,
                backend=engine.grammar_backend,
            ),
        )

    def _scheduler(self, model: ModelPlan, engine: EnginePlan) -> ChildSpec:
        name, settings, role = engine.scheduler, engine.settings, engine.role
        others = {
            "prefill": [each.scheduler for each in _of_role(model, "decode")],
            "decode": [each.scheduler for each in _of_role(model, "prefill")],
        }
        return self._worker(
            name,
            "scheduler",
            f"llm_runtime.actors.scheduler.{_SCHEDULERS[role]}",
            peers=[
                *engine.rank_names,
                *([engine.transfer_actor] if engine.transfer_actor else []),
                engine.grammar,
                *others.get(role, []),
                *([model.detokenizer] if role != "prefill" else []),
                "bootstrap",
                *self.ingresses,
            ],
            descriptors=[f"{engine.name}.pages"],
            config=SchedulerConfig(
                engine=engine.name,
                role=role,
                transfer=engine.transfer_actor,
                shared_kv=engine.shared_kv,
                prefill_schedulers=others["decode"] if role == "decode" else [],
                local_prefill_tokens=settings.local_prefill_tokens,
                model=model.served_name,
                address=self.addresses[name],
                leader=engine.rank_names[0],
                detokenizer=model.detokenizer,
                bootstrap="bootstrap",
                grammar=engine.grammar,
                page_size=settings.page_size,
                num_pages=engine.num_pages,
                first_page=engine.first_page,
                arena_pages=engine.arena_pages,
                max_model_len=model.max_model_len,
                tp=settings.tp,
                chunk_tokens=settings.chunk_tokens,
                max_step_ms=settings.max_step_ms if role != "prefill" else 0,
                max_running=settings.max_running,
                max_queue=settings.max_queue,
                policy=settings.policy,
                poison_limit=settings.poison_limit,
                run_ahead=settings.run_ahead,
                # Prompts in lent pages: what is cached is for the decode engine to know.
                prefix_cache=settings.prefix_cache and not (role == "prefill" and engine.shared_kv),
                speculation=settings.speculation if role != "prefill" else "off",
                num_speculative_tokens=settings.num_speculative_tokens,
                prompt_lookup_min=settings.prompt_lookup_min,
                prompt_lookup_max=settings.prompt_lookup_max,
            ),
        )

    def _ingress(self, name: str) -> ChildSpec:
        settings, plan = self.plan.topology.ingress, self.plan
        return self._worker(
            name,
            "ingress",
            "llm_runtime.actors.ingress:Ingress",
            peers=[
                *(model.tokenizer for model in plan.models),
                *(["bootstrap"] if self.schedulers else []),
                *(model.detokenizer for model in plan.models if model.engines),
                *self.schedulers,
                *(engine.actor for engine in plan.encoders),
                *(peer for peer in self.ingresses if peer != name),
            ],
            descriptors=[LISTENER, _journal(name)],
            shutdown_s=settings.drain_s + _STOP_MARGIN_S,
            config=IngressConfig(
                models=[self._served_model(model) for model in plan.models],
                api_key=plan.api_key,
                admin_api_key=plan.admin_api_key,
                cors_origins=settings.cors_origins or [],
                allowed_hosts=_allowed_hosts(plan),
                request_timeout_s=settings.request_timeout_s,
                drain_s=settings.drain_s,
                max_body_bytes=settings.max_body_bytes,
                max_concurrent=settings.max_concurrent,
                status_socket=str(self.run_dir / STATUS_SOCKET),
                access_log=settings.access_log,
                cache_report=settings.cache_report,
                priority=settings.priority,
                response_dir=str(self.run_dir / "responses"),
                response_store_bytes=settings.response_store_bytes,
                crash_dump_dir=str(plan.crash_dump_dir or ""),
                tracing=self._tracing(),
            ),
        )

    def _served_model(self, model: ModelPlan) -> ServedModel:
        """What an ingress worker is told of a model."""
        formats = output_formats(model, self.plan.topology.ingress) if model.engines else {}
        served = ServedModel(
            model=model.served_name,
            served_model_names=[model.served_name],
            max_model_len=model.max_model_len,
            vocab_size=model.config.vocab_size,
            eos_token_ids=model.config.eos_token_ids,
            sampling=model.sampling,
            tokenizer=model.tokenizer,
            tool_call_parser=formats.get("tool_call_parser"),
            reasoning_parser=formats.get("reasoning_parser"),
            task=model.task,
            encoders=[engine.actor for engine in model.encoders],
            files=checkpoint_facts(model.model.path),
        )
        config = model.config
        if isinstance(config, PoolingConfig):
            return structs.replace(
                served, vector_size=config.vector_size, labels=config.labels, activation=config.activation
            )
        return served

    def _tracing(self) -> TracingConfig | None:
        settings = self.plan.topology.tracing
        if not settings.endpoint:
            return None
        return TracingConfig(settings.endpoint, settings.sample_rate, settings.service_name, self.plan.name)

    def _worker(
        self,
        name: str,
        role: str,
        start: str,
        *,
        peers: Sequence[str],
        config: msgspec.Struct | None = None,
        descriptors: Sequence[str] = (),
        shutdown_s: float | None = None,
    ) -> ChildSpec:
        given = self.plan.topology.faults
        faults = None
        if given.drop_rate or given.delay_rate:
            faults = Faults(given.drop_rate or 0.0, given.delay_rate or 0.0, given.delay_s, given.seed)
        args = ActorArgs(
            address=self.addresses[name],
            peers={peer: self.addresses[peer] for peer in peers},
            config={} if config is None else msgspec.to_builtins(config),
            busy_limit_s=self.supervision.busy_limit_s,
            faults=faults,
        )
        return ChildSpec(
            id=name,
            role=role,
            start=start,
            args=msgspec.to_builtins(args),
            descriptors=tuple(descriptors),
            shutdown=int(1000 * (shutdown_s or self.supervision.shutdown_s)),
            start_timeout_ms=int(1000 * self.supervision.start_timeout_s),
            heartbeat_timeout_ms=int(1000 * self.supervision.heartbeat_timeout_s),
        )

    def _nested(self, name: str, role: str, children: Sequence[ChildSpec], strategy: Any = "one_for_one") -> ChildSpec:
        return ChildSpec(
            id=name,
            role=role,
            type="supervisor",
            supervisor=self._supervisor(children, strategy),
            start_timeout_ms=sum(child.start_timeout_ms for child in children) + 1000,
            heartbeat_timeout_ms=int(1000 * self.supervision.heartbeat_timeout_s),
        )

    def _supervisor(self, children: Sequence[ChildSpec], strategy: Any = "one_for_one") -> SupervisorSpec:
        return SupervisorSpec(
            strategy=strategy,
            children=tuple(children),
            intensity=self.supervision.intensity,
            period_s=self.supervision.period_s,
        )
