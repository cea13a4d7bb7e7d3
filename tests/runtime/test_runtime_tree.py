"""From a topology and a model to the supervision tree."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm_runtime.actors.actor import ActorArgs
from llm_runtime.actors.bootstrap import BootstrapConfig
from llm_runtime.actors.checkpoint import ModelConfig, SamplingDefaults
from llm_runtime.actors.detokenizer.actor import DetokenizerConfig
from llm_runtime.actors.grammar import GrammarConfig
from llm_runtime.actors.ingress.config import IngressConfig
from llm_runtime.actors.rank import RankConfig, kv_format, weight_bytes
from llm_runtime.actors.scheduler.config import Config as SchedulerConfig
from llm_runtime.actors.tokenizer.actor import TokenizerConfig
from llm_runtime.runtime import model_plan, resource_check
from llm_runtime.runtime import plan as plan_module
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.http_limits import describe_http, http_warnings
from llm_runtime.runtime.models import ResolvedModel
from llm_runtime.runtime.plan import NodePlan, plan_node
from llm_runtime.runtime.topology import TopologyError, load_topology
from llm_runtime.runtime.tree import actor_names, arena_sizes, build_tree
from llm_runtime.supervisors import ChildSpec, SupervisorSpec, validate

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=128,
    vocab_size=320,
    max_position=2048,
    rope_theta=1e4,
    rms_eps=1e-5,
    tie_embeddings=True,
    eos_token_ids=[2, 5],
)


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a topology with a small model in place of a file's."""
    monkeypatch.setattr(model_plan, "resolve_model", lambda *_: ResolvedModel("tiny", tmp_path / "tiny.gguf"))
    monkeypatch.setattr(model_plan, "read_config", lambda _: MODEL)
    monkeypatch.setattr(model_plan, "read_sampling_defaults", lambda _: SamplingDefaults())
    monkeypatch.delenv("RUNTIME_API_KEY", raising=False)

    def plan(*settings: str, head: str = '[model]\npath = "m"\n[engine.main]\n', text: str = "") -> NodePlan:
        file = tmp_path / "small.toml"
        file.write_text(head + text)
        return plan_node(load_topology(file, settings))

    return plan


def find(spec: SupervisorSpec, name: str) -> ChildSpec:
    return next(child for child in spec.descendants() if child.id == name)


def names(spec: SupervisorSpec) -> list[Any]:
    """Ids of the children, those of supervisors with their own as a list."""
    return [[child.id, names(child.supervisor)] if child.supervisor else child.id for child in spec.children]


def test_names_and_strategies(plan_of: Any, tmp_path: Path) -> None:
    spec = build_tree(plan_of("engine.main.tp=2", "ingress.workers=2"), tmp_path)
    validate(spec)
    assert names(spec) == [
        "bootstrap",
        ["main", [["main.ranks", ["main.rank0", "main.rank1"]], "main.scheduler", "main.grammar"]],
        "detokenizer",
        "tokenizer",
        "ingress0",
        "ingress1",
    ]
    strategies = {child.id: child.supervisor.strategy for child in spec.descendants() if child.supervisor}
    assert strategies == {"main": "one_for_one", "main.ranks": "one_for_all"}
    workers = [child for child in spec.descendants() if child.type == "worker"]
    assert [child.id for child in workers] == actor_names(plan_of("engine.main.tp=2", "ingress.workers=2"))
    assert all(child.role in child.id for child in workers)


def test_two_engines(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of(text="[engine.second]\ntp = 3\n")
    spec = build_tree(plan, tmp_path)
    validate(spec)
    assert [child.id for child in spec.children][:3] == ["bootstrap", "main", "second"]
    args = msgspec.convert(find(spec, "ingress0").args, ActorArgs)
    assert {"main.scheduler", "second.scheduler"} <= args.peers.keys()
    assert {"main.pages", "second.rank2.kv", "second.rank2.weights"} <= arena_sizes(plan).keys()


def test_everybody_knows_whom_he_sends_to(plan_of: Any, tmp_path: Path) -> None:
    spec = build_tree(plan_of("engine.main.tp=2", "ingress.workers=2"), tmp_path)
    peers = {
        child.id: msgspec.convert(child.args, ActorArgs).peers for child in spec.descendants() if child.type == "worker"
    }
    ingresses = {"ingress0", "ingress1"}
    assert {name: set(known) for name, known in peers.items()} == {
        "bootstrap": {"main.scheduler"} | ingresses,
        "main.rank0": {"main.scheduler", "main.rank1"} | ingresses,
        "main.rank1": {"main.scheduler", "main.rank0"} | ingresses,
        "main.grammar": {"main.scheduler"} | ingresses,
        "main.scheduler": {"main.rank0", "main.rank1", "main.grammar", "detokenizer", "bootstrap"} | ingresses,
        "detokenizer": {"main.scheduler"} | ingresses,
        "tokenizer": ingresses,
        "ingress0": {"tokenizer", "bootstrap", "detokenizer", "main.scheduler", "ingress1"},
        "ingress1": {"tokenizer", "bootstrap", "detokenizer", "main.scheduler", "ingress0"},
    }
    addresses = {child.id: child.args["address"] for child in spec.descendants() if child.type == "worker"}
    assert all(addresses[name] == address for known in peers.values() for name, address in known.items())
    assert set(addresses.values()) == {f"ipc://{tmp_path}/sockets/{name}" for name in addresses}


def test_every_role_accepts_its_settings(plan_of: Any, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    spec = build_tree(
        plan_of(
            "engine.main.tp=2",
            "engine.main.kv_tokens=1000",
            "engine.main.page_size=32",
            "engine.main.kv_dtype=int8",
            "engine.main.chunk_tokens=64",
            "engine.main.max_running=8",
            "engine.main.policy=lpm",
            "engine.main.run_ahead=false",
            "engine.main.threads=3",
            "model.dtype=bfloat16",
            "model.deterministic=true",
            "model.served_name=served",
            f"model.chat_template={template}",
            "ingress.api_key=secret",
            "ingress.drain_s=2",
        ),
        tmp_path,
    )
    kinds = {
        "bootstrap": BootstrapConfig,
        "main.rank1": RankConfig,
        "main.grammar": GrammarConfig,
        "main.scheduler": SchedulerConfig,
        "detokenizer": DetokenizerConfig,
        "tokenizer": TokenizerConfig,
        "ingress0": IngressConfig,
    }
    configs: dict[str, Any] = {
        name: msgspec.convert(find(spec, name).args["config"], kind) for name, kind in kinds.items()
    }
    rank, scheduler, ingress = configs["main.rank1"], configs["main.scheduler"], configs["ingress0"]
    (model,) = ingress.models
    rank.check()
    assert (rank.rank, rank.tp, rank.dtype, rank.deterministic, rank.threads) == (1, 2, "bfloat16", True, 3)
    assert rank.kv_dtype == "int8"
    assert (rank.num_pages, rank.page_size) == (scheduler.num_pages, scheduler.page_size) == (32, 32)
    assert rank.max_model_len == scheduler.max_model_len == model.max_model_len == 1000
    assert rank.max_slots >= scheduler.max_running == 8
    assert rank.max_step_tokens >= scheduler.chunk_tokens + scheduler.max_running
    assert (scheduler.policy, scheduler.run_ahead, scheduler.leader) == ("lpm", False, "main.rank0")
    assert scheduler.model == model.model == "served"
    assert model.served_model_names == ["served"]
    assert (model.eos_token_ids, model.vocab_size, ingress.api_key) == ([2, 5], 320, "secret")
    assert find(spec, "ingress0").shutdown_ms == 7000
    assert configs["tokenizer"].chat_template == str(template)


def test_memory_and_descriptors(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of("engine.main.tp=2", "engine.main.kv_tokens=100")
    sizes = arena_sizes(plan)
    spec = build_tree(plan, tmp_path)
    wanted = [name for child in spec.descendants() if child.type == "worker" for name in child.descriptors]
    assert sorted(wanted) == sorted([*sizes, "listener"])
    for rank in range(2):
        assert find(spec, f"main.rank{rank}").descriptors == (f"main.rank{rank}.weights", f"main.rank{rank}.kv")
        assert sizes[f"main.rank{rank}.kv"] == 7 * kv_format(MODEL, "float32", 16, 2, rank).page_bytes
        assert sizes[f"main.rank{rank}.weights"] == weight_bytes(MODEL, "float32", 2, rank)
    quantized = arena_sizes(plan_of("engine.main.tp=2", "engine.main.kv_tokens=100", "engine.main.kv_dtype=int8"))
    assert quantized["main.rank0.kv"] == 7 * kv_format(MODEL, "int8", 16, 2, 0).page_bytes < sizes["main.rank0.kv"] / 2
    assert sizes["main.rank0.kv"] == 2 * sizes["main.rank1.kv"]  # 3 key-value heads, divided 2 and 1


@pytest.mark.parametrize(
    ("stored", "setting", "dtype", "kv_dtype"),
    [
        ("F32", "auto", "float32", "float32"),
        ("Q4_K", "auto", "int4", "bfloat16"),
        ("Q8_0", "auto", "int8", "bfloat16"),
        ("F16", "auto", "bfloat16", "bfloat16"),
        ("Q4_0", "float32", "float32", "float32"),
        ("BF16", "int4", "int4", "bfloat16"),
    ],
)
def test_types_of_numbers(
    plan_of: Any, monkeypatch: pytest.MonkeyPatch, stored: str, setting: str, dtype: Any, kv_dtype: Any
) -> None:
    config = msgspec.structs.replace(MODEL, weight_type=stored)
    monkeypatch.setattr(model_plan, "read_config", lambda _: config)
    plan = plan_of(f"model.dtype={setting}")
    (engine,) = plan.engines
    assert (engine.dtype, engine.kv_dtype) == (dtype, kv_dtype)
    assert engine.weight_bytes == [weight_bytes(config, dtype, 1, 0)]
    assert engine.kv_bytes == [engine.num_pages * kv_format(config, kv_dtype, 16, 1, 0).page_bytes]


def test_a_gpu_has_its_own_memory(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of("engine.main.device=cuda")
    assert set(arena_sizes(plan)) == {"main.pages", "ingress0.journal"}
    rank = find(build_tree(plan, tmp_path), "main.rank0")
    assert rank.descriptors == ()
    assert (rank.args["config"]["device"], rank.args["config"]["dtype"]) == ("cuda", "bfloat16")


def test_supervision_settings(plan_of: Any, tmp_path: Path) -> None:
    spec = build_tree(
        plan_of(
            "supervision.intensity=7",
            "supervision.period_s=3",
            "supervision.heartbeat_timeout_s=1.5",
            "supervision.start_timeout_s=9",
            "supervision.shutdown_s=0.5",
            "supervision.busy_limit_s=11",
        ),
        tmp_path,
    )
    supervisors = [spec, *(child.supervisor for child in spec.descendants() if child.supervisor)]
    assert {(each.intensity, each.period_s) for each in supervisors} == {(7, 3.0)}
    tokenizer = find(spec, "tokenizer")
    assert (tokenizer.heartbeat_timeout_ms, tokenizer.start_timeout_ms, tokenizer.shutdown_ms) == (1500, 9000, 500)
    assert tokenizer.args["busy_limit_s"] == 11
    assert find(spec, "main").start_timeout_ms > find(spec, "main.ranks").start_timeout_ms > 9000
    assert find(spec, "main").shutdown_ms is None


def test_names_and_addresses_of_the_node(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("ingress.port=8123")
    assert (plan.name, plan.url, plan.models[0].served_name) == ("small-8123", "http://127.0.0.1:8123", "tiny")
    assert plan_of("ingress.host=0.0.0.0").url == "http://127.0.0.1:8000"
    assert plan_of('ingress.host="::"').url == "http://[::1]:8000"
    assert plan_of("ingress.host=::1").url == "http://[::1]:8000"
    assert plan_of("node.name=mine").name == "mine"
    monkeypatch.setenv("RUNTIME_API_KEY", "from-environment")
    assert plan_of().api_key == "from-environment"
    assert plan_of("ingress.api_key=from-topology").api_key == "from-topology"
    monkeypatch.setenv("RUNTIME_API_KEY", " of-a-file\r\n")
    assert plan_of().api_key == "of-a-file"
    monkeypatch.setenv("RUNTIME_API_KEY", "\n")
    assert plan_of().api_key is None


def test_keys_that_help_nobody(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("two words", "schlüssel", "a\tb"):
        with pytest.raises(UserError, match=r"ingress\.api_key: give a key .* without blanks"):
            plan_of(f"ingress.api_key={json.dumps(key)}")
        monkeypatch.setenv("RUNTIME_API_KEY", key)
        with pytest.raises(UserError, match=r"^\$RUNTIME_API_KEY must be a key .* without blanks"):
            plan_of()
    monkeypatch.setenv("RUNTIME_API_KEY", "same")
    with pytest.raises(UserError, match=r"ingress\.admin_api_key: is the clients' key too"):
        plan_of("ingress.admin_api_key=same")


@pytest.mark.parametrize(
    ("origin", "is_one"),
    [
        *((each, True) for each in ("https://a.example", "http://[::1]:3000/", "app://obsidian.md", "null", "*")),
        *((each, False) for each in ("a.example", "localhost:3000", "https://a.example/x", "http://*:1", "")),
    ],
)
def test_origins(plan_of: Any, origin: str, is_one: bool) -> None:
    """What no browser sends as an origin would be without an effect."""
    with contextlib.nullcontext() if is_one else pytest.raises(UserError, match="a list of origins"):
        plan_of(f"ingress.cors_origins={json.dumps([origin])}")


def test_who_may_ask(plan_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(*settings: str) -> dict[str, Any]:
        made: dict[str, Any] = find(build_tree(plan_of(*settings), tmp_path), "ingress0").args["config"]
        return made

    for host, is_open in (("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True)):
        assert plan_of(f'ingress.host="{host}"').is_open == is_open
        assert not plan_of(f'ingress.host="{host}"', "ingress.api_key=x").is_open
        warnings = http_warnings(plan_of(f'ingress.host="{host}"'))
        assert [("RUNTIME_API_KEY" in each) for each in warnings] == [True] * is_open
        assert (config(f'ingress.host="{host}"')["allowed_hosts"] is None) == is_open
    assert config("ingress.api_key=x")["allowed_hosts"] is None
    given = config('ingress.allowed_hosts=["llm.example.com"]', "ingress.api_key=x", "ingress.host=0.0.0.0")
    assert "llm.example.com" in given["allowed_hosts"]
    assert config('ingress.cors_origins=["https://a.example"]')["cors_origins"] == ["https://a.example"]
    assert config()["admin_api_key"] is None
    monkeypatch.setenv("RUNTIME_ADMIN_API_KEY", "from-environment")
    assert config()["admin_api_key"] == "from-environment"
    assert config("ingress.admin_api_key=from-topology")["admin_api_key"] == "from-topology"


def test_warnings_of_too_few_descriptors(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("ingress.max_concurrent=700")
    for limit, allowed, warned in ((4096, 3840, False), (1024, 768, False), (900, 644, True), (600, 400, True)):
        monkeypatch.setattr("llm_runtime.runtime.http_limits._descriptors", lambda limit=limit: limit)
        assert f"{allowed:,} connections (ulimit -n {limit:,})" in describe_http(plan)
        assert bool(http_warnings(plan)) == warned


def test_the_longest_request(plan_of: Any) -> None:
    assert plan_of().models[0].max_model_len == 2048
    assert plan_of("engine.main.kv_tokens=512").models[0].max_model_len == 512
    assert plan_of("model.max_model_len=100").models[0].max_model_len == 100


def test_cores_are_divided(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.os, "sched_getaffinity", lambda _: set(range(9)))
    assert [engine.threads for engine in plan_of().engines] == [9]
    assert [engine.threads for engine in plan_of("engine.main.tp=2", text="[engine.b]\n").engines] == [3, 3]
    assert [engine.threads for engine in plan_of("engine.main.threads=5").engines] == [5]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("engine.main.tp=4", "engine.main.tp: .*3 key-value heads"),
        ("model.max_model_len=2049", "model.max_model_len: is 2049, and the model's own limit is 2048"),
        ("engine.main.kv_tokens=2000000000", "engine.main.kv_tokens: .* and this machine has .*; give at most [0-9]+$"),
        ("model.chat_template=/no/such", "model.chat_template: there is no file /no/such; give a Jinja file"),
    ],
)
def test_what_does_not_fit_the_model(plan_of: Any, setting: str, expected: str) -> None:
    with pytest.raises(TopologyError, match=f"^--set {setting}: {expected}"):
        plan_of(setting)


def test_a_broken_chat_template_is_found_early(plan_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    for content in (b"{% if %}", bytes(range(128, 200))):
        file.write_bytes(content)
        with pytest.raises(TopologyError, match=r"model.chat_template: .* is no Jinja template"):
            plan_of(f"model.chat_template={file}")


def test_rdma_needs_a_device(plan_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_check, "_RDMA", tmp_path / "infiniband")
    rdma = ("transfer.engine=mooncake", "transfer.protocol=rdma")
    with pytest.raises(TopologyError, match=r'transfer.protocol: is "rdma", and this machine has no RDMA device'):
        plan_of(*rdma, text=APART)
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    plan_of(*rdma, text=APART)
    with pytest.raises(TopologyError, match=r'transfer.device: is "mlx5_9"; this machine has mlx5_0'):
        plan_of(*rdma, "transfer.device=mlx5_9", text=APART)


def test_a_model_that_does_not_fit_into_memory(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_check, "memory_bytes", lambda: 100_000)
    figures = r"needs [0-9.]+ GiB of memory, [0-9.]+ GiB for weights \(main [0-9.]+ GiB a rank\) and [0-9.]+ GiB for KV"
    with pytest.raises(TopologyError, match=rf"small.toml:2: model.path: {figures}.* choose a smaller model"):
        plan_of("engine.main.kv_tokens=16")


APART = """
[engine.p]
role = "prefill"
[engine.d0]
role = "decode"
kv_tokens = 4096
[engine.d1]
role = "decode"
kv_tokens = 2048
"""


def test_models_share_neither_engines_nor_memory(plan_of: Any, tmp_path: Path) -> None:
    apart = "".join(
        f'[engine.{role[0]}{index}]\nmodel = "m{index}"\nrole = "{role}"\n'
        for index in range(2)
        for role in ("prefill", "decode")
    )
    models = "".join(f'[[model]]\npath = "m"\nserved_name = "m{index}"\n' for index in range(2))
    plan = plan_of(head=models, text=apart)
    spec = build_tree(plan, tmp_path)
    assert [child.id for child in spec.descendants() if child.type == "worker"] == actor_names(plan)
    for index, other in ((0, 1), (1, 0)):
        scheduler = find(spec, f"d{index}.scheduler").args
        assert scheduler["config"]["model"] == f"m{index}"
        assert scheduler["config"]["prefill_schedulers"] == [f"p{index}.scheduler"]
        assert {f"p{index}.scheduler", f"model{index}.detokenizer"} <= scheduler["peers"].keys()
        assert not any(name.startswith((f"p{other}.", f"d{other}.", f"model{other}.")) for name in scheduler["peers"])
        receiver = find(spec, f"d{index}.kv_receiver")
        assert f"p{other}.kv_sender" not in receiver.args["peers"]
        assert receiver.descriptors == (f"d{index}.rank0.kv",)
        assert find(spec, f"p{index}.rank0").descriptors == (f"p{index}.rank0.weights", f"d{index}.rank0.kv")
        detokenizer = find(spec, f"model{index}.detokenizer").args["peers"]
        assert set(detokenizer) == {f"d{index}.scheduler", "ingress0"}
    ingress = msgspec.convert(find(spec, "ingress0").args["config"], IngressConfig)
    assert [(model.model, model.tokenizer) for model in ingress.models] == [
        ("m0", "model0.tokenizer"),
        ("m1", "model1.tokenizer"),
    ]


def test_prefill_and_decode_engines_share_memory(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of(text=APART)
    main, prefill, first, second = plan.engines
    assert not main.shared_kv
    assert {prefill.shared_kv, first.shared_kv, second.shared_kv} == {True}
    assert prefill.kv_arenas == first.kv_arenas == second.kv_arenas == ["d0.rank0.kv"]
    assert [(each.first_page, each.num_pages) for each in (first, second)] == [(0, 256), (256, 128)]
    assert {each.arena_pages for each in (prefill, first, second)} == {384}
    assert main.weight_arenas == prefill.weight_arenas == second.weight_arenas == ["main.rank0.weights"]
    assert arena_sizes(plan)["d0.rank0.kv"] == 384 * first.formats[0].page_bytes
    assert not {"p.rank0.kv", "d1.rank0.kv", "p.rank0.weights"} & arena_sizes(plan).keys()
    spec = build_tree(plan, tmp_path)
    validate(spec)
    assert find(spec, "p.rank0").descriptors == ("main.rank0.weights", "d0.rank0.kv")
    assert find(spec, "d0.kv_receiver").args["config"]["transfer"]["kind"] == "shared"


@pytest.mark.parametrize(
    ("setting", "kind", "sources"),
    [
        ("engine.p.tp=2", "shm", ["p.rank0.kv", "p.rank1.kv"]),
        ("transfer.engine=mooncake", "mooncake", []),
        ("transfer.engine=tcp", "tcp", []),
    ],
)
def test_pages_are_copied_where_memory_cannot_be_shared(
    plan_of: Any, tmp_path: Path, setting: str, kind: str, sources: list[str]
) -> None:
    plan = plan_of(setting, text=APART)
    assert not any(each.shared_kv for each in plan.engines)
    receiver = find(build_tree(plan, tmp_path), "d0.kv_receiver")
    assert receiver.args["config"]["transfer"]["kind"] == kind
    assert receiver.args["config"]["sources"] == sources
    assert receiver.descriptors == ("d0.rank0.kv", *sources)
