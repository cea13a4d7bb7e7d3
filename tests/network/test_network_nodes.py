"""Topologies of several nodes: their errors, and which part of the tree each node runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from llm_runtime.actors.actor import ActorArgs
from llm_runtime.actors.checkpoint import ModelConfig, SamplingDefaults
from llm_runtime.runtime import model_plan
from llm_runtime.runtime import plan as plan_module
from llm_runtime.runtime.cli import main
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.keys import write_keys
from llm_runtime.runtime.models import ResolvedModel
from llm_runtime.runtime.placement import node_to_start
from llm_runtime.runtime.plan import NodePlan, plan_node
from llm_runtime.runtime.ports import check_machine, check_ports, listening
from llm_runtime.runtime.topology import Machine, Topology, TopologyError, load_topology
from llm_runtime.runtime.tree import actor_names, arena_sizes, build_tree
from llm_runtime.supervisors import SupervisorSpec, validate

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
HEAD = '[model]\npath = "m"\n[engine.main]\n'
PAIR = """\
[model]
path = "m"
[node]
log_level = "debug"
[node.a]
address = "127.77.0.1"
[node.b]
address = "127.77.0.2"
port = 9000
[engine.main]
node = "b"
[engine.near]
[transport]
keys = "k"
"""


def errors(tmp_path: Path, text: str, *settings: str) -> list[str]:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(TopologyError) as caught:
        load_topology(file, settings)
    return [line.replace(f"{tmp_path}/", "") for line in caught.value.errors]


Plan = Callable[..., NodePlan]


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans a node of PAIR with a small model in place of a file's."""
    monkeypatch.setattr(model_plan, "resolve_model", lambda *_: ResolvedModel("tiny", tmp_path / "tiny.gguf"))
    monkeypatch.setattr(model_plan, "read_config", lambda _: MODEL)
    monkeypatch.setattr(model_plan, "read_sampling_defaults", lambda _: SamplingDefaults())
    write_keys(tmp_path / "k")

    def plan(node: str | None, *settings: str, text: str = PAIR) -> NodePlan:
        file = tmp_path / "pair.toml"
        file.write_text(text)
        loaded = load_topology(file, settings)
        made = plan_node(loaded, node=node)
        check_ports(loaded, made)
        check_machine(loaded, made)
        return made

    return plan


def args_of(spec: SupervisorSpec) -> dict[str, ActorArgs]:
    return {child.id: msgspec.convert(child.args, ActorArgs) for child in spec.descendants() if child.type == "worker"}


def test_scalars_and_tables_of_node_stand_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(PAIR)
    topology = load_topology(file, ["node.b.port=9100", "node.name=n"]).topology
    assert (topology.node.log_level, topology.node.name) == ("debug", "n")
    assert topology.nodes == {"a": Machine("127.77.0.1"), "b": Machine("127.77.0.2", 9100)}
    assert (topology.engine["main"].node, topology.engine["near"].node, topology.ingress.node) == ("b", None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "[node.a]\n", "x.toml:4: node.a.address: missing; give a string"),
        (HEAD + '[node.a]\naddress = "h"\nprt = 1\n', "x.toml:6: node.a.prt: unknown key; did you mean node.a.port?"),
        (HEAD + '[node.a]\naddress = "0.0.0.0"\n', 'x.toml:5: node.a.address: is "0.0.0.0"; give the IP address or'),
        (HEAD + '[node.a]\naddress = "10.0.0.300"\n', 'x.toml:5: node.a.address: is "10.0.0.300"; give the IP add'),
        (HEAD + '[node.a]\naddress = "tcp://h:1"\n', 'x.toml:5: node.a.address: is "tcp://h:1"; give the IP address'),
        (HEAD + '[node.a]\naddress = "h"\nport = 0\n', "x.toml:6: node.a.port: is 0; give an integer from 1 to 65535"),
        (HEAD + '[node."a.b"]\naddress = "h"\n', "x.toml:4: node.a.b: a node's name has up to 32 letters, digits"),
        (HEAD + '[node.name]\naddress = "h"\n', 'x.toml:4: node.name: is {"address": "h"}; give a string of letters'),
        (HEAD + "[node]\nadress = 1\n", "x.toml:5: node.adress: unknown key; did you mean"),
        (HEAD + 'node = "a"\n', 'x.toml:4: engine.main.node: is "a", and there is no such node; add address = "10.0.'),
        (
            PAIR.replace('node = "b"', 'node = "c"'),
            'x.toml:11: engine.main.node: is "c", and there is no such node; give "a" or "b"',
        ),
        (
            PAIR + '[ingress]\nnode = "x"\n',
            'x.toml:16: ingress.node: is "x", and there is no such node; give "a" or "b"',
        ),
        (
            PAIR.replace('keys = "k"\n', ""),
            "x.toml:13: transport.keys: missing; machines talk only under keys: run `runtime keygen transport.keys`, ",
        ),
    ],
)
def test_an_error_names_place_key_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    found = errors(tmp_path, text)
    assert [line[: len(expected)] for line in found] == [expected]


def test_the_example_of_the_documentation_is_right(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/deployment.md").read_text()
    file = tmp_path / "pair.toml"
    file.write_text(text.partition("```toml\n")[2].partition("```")[0])
    topology = load_topology(file).topology
    assert list(topology.nodes) == ["a", "b"]
    assert topology.engine["far"].node == "b"


def test_each_node_runs_its_part(plan_of: Plan, tmp_path: Path) -> None:
    a, b = plan_of("a"), plan_of("b")
    spec_a, spec_b = build_tree(a, tmp_path / "run-a"), build_tree(b, tmp_path / "run-b")
    validate(spec_a)
    validate(spec_b)
    assert [child.id for child in spec_a.children] == ["bootstrap", "near", "detokenizer", "tokenizer", "ingress0"]
    assert [child.id for child in spec_b.children] == ["main"]
    assert sorted(args_of(spec_a) | args_of(spec_b)) == sorted(actor_names(a))
    assert set(arena_sizes(a)) == {"ingress0.journal", "near.pages", "near.rank0.weights", "near.rank0.kv"}
    assert set(arena_sizes(b)) == {"main.pages", "main.rank0.weights", "main.rank0.kv"}
    assert (a.name, b.name) == ("pair-a", "pair-b")
    assert (a.url, b.url) == ("http://127.0.0.1:8000", "")
    assert plan_of("b", "node.name=n").name == "n-b"


def test_threads_are_divided_among_the_ranks_of_the_node(plan_of: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.os, "sched_getaffinity", lambda _: set(range(8)))
    assert [engine.threads for engine in plan_of("b").engines if engine.name == "main"] == [8]


def test_peers_elsewhere_are_reached_over_tcp_and_others_are_not(plan_of: Plan, tmp_path: Path) -> None:
    args = args_of(build_tree(plan_of("a"), tmp_path)) | args_of(build_tree(plan_of("b"), tmp_path))
    place = {name: "b" if name.startswith("main.") else "a" for name in args}
    ports = listening(plan_of(None))
    for name, each in args.items():
        for peer, address in each.peers.items():
            if place[peer] == place[name]:
                assert address == args[peer].address == f"ipc://{tmp_path}/sockets/{peer}"
            else:
                host = {"a": "127.77.0.1", "b": "127.77.0.2"}[place[peer]]
                assert address == f"tcp://{host}:{ports[peer]}"
                assert each.network is not None
                receiver = args[peer].network
                assert receiver is not None
                assert receiver.listen == address
                assert (receiver.public, receiver.secret) == (each.network.public, each.network.secret)
    # Nobody listens who need not.
    assert {name for name, each in args.items() if each.network is not None and each.network.listen} == {
        "bootstrap",
        "detokenizer",
        "ingress0",
        "main.scheduler",
    }
    rank = args["main.rank0"].network  # it tells the ingress its figures, and is told nothing
    assert rank is not None
    assert rank.listen == ""
    assert args["tokenizer"].network is None
    assert args["near.rank0"].network is None


def test_ports_follow_from_the_file_alone(plan_of: Plan) -> None:
    assert listening(plan_of("a")) == listening(plan_of("b")) == listening(plan_of(None))
    names = [name for name in actor_names(plan_of(None)) if name.startswith("main.")]
    assert listening(plan_of("b"))["main.scheduler"] == 9000 + names.index("main.scheduler")


def test_one_node_needs_no_keys_and_no_tcp(plan_of: Plan, tmp_path: Path) -> None:
    plan = plan_of("a", text=HEAD + '[node.a]\naddress = "127.77.0.1"\n')
    assert all(each.network is None for each in args_of(build_tree(plan, tmp_path)).values())
    assert plan.name == "pair-a"


def test_host_names_and_ipv6(plan_of: Plan, tmp_path: Path) -> None:
    settings = ("node.a.address=localhost", "node.b.address=::1")
    a, b = (args_of(build_tree(plan_of(node, *settings), tmp_path)) for node in "ab")
    assert a["ingress0"].peers["main.scheduler"].startswith("tcp://[::1]:90")
    assert b["main.scheduler"].peers["ingress0"].startswith("tcp://localhost:86")
    assert a["ingress0"].network is not None
    assert a["ingress0"].network.listen.rpartition(":")[0] in ("tcp://127.0.0.1", "tcp://[::1]")


def test_ports_that_clash(plan_of: Plan) -> None:
    with pytest.raises(
        TopologyError, match=r"toml:9: node\.b\.port: is 8602, so the node's actors take ports 8602 to "
    ):
        plan_of(None, "node.b.address=127.77.0.1", text=PAIR.replace("9000", "8602"))
    with pytest.raises(TopologyError, match=r"node\.b\.port: is 65535, .* and 65535 is the last one; give another"):
        plan_of(None, "node.b.port=65535")
    with pytest.raises(TopologyError, match=r"toml:5: node\.a\.port: is 8600, .* HTTP has port 8601 of the same mach"):
        plan_of(None, "ingress.port=8601")


def test_addresses_and_ports_that_this_machine_does_not_have(plan_of: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TopologyError, match=r'node\.b\.address: is "192\.0\.2\.1", on which this machine cannot listen'
    ):
        plan_of("b", "node.b.address=192.0.2.1")
    plan_of("a", "node.b.address=192.0.2.1")  # it need not be there
    with pytest.raises(
        TopologyError, match=r'node\.b\.address: there is no host "no\.such\.host\.invalid"; give an IP'
    ):
        plan_of("b", "node.b.address=no.such.host.invalid")
    with monkeypatch.context() as patched:
        patched.setattr(
            "llm_runtime.runtime.ports.ip_address", lambda _: "127.0.1.1"
        )  # as many a machine knows its own name
        with pytest.raises(
            TopologyError, match=r'node\.b\.address: is "me", which is 127\.0\.1\.1 for this machine itse'
        ):
            plan_of("b", "node.b.address=me")
    with socket.socket() as other:
        other.bind(("127.77.0.2", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            TopologyError, match=rf"node\.b\.port: port {port}, which is for main\.scheduler, is in use"
        ):
            plan_of("b", f"node.b.port={port - 1}")


def test_keys_that_cannot_be_used(plan_of: Plan, tmp_path: Path) -> None:
    (tmp_path / "k").chmod(0o644)
    with pytest.raises(
        TopologyError, match=r"pair\.toml:14: transport\.keys: .* can be read or written by other users"
    ):
        plan_of("a")
    (tmp_path / "k").unlink()
    with pytest.raises(TopologyError, match=r"pair\.toml:14: transport\.keys: there is no file .*`runtime keygen "):
        plan_of(None)


def test_which_node_to_start(plan_of: Plan) -> None:
    several = plan_of(None).topology
    assert node_to_start(several, "b") == "b"
    with pytest.raises(UserError, match=r"has several nodes: choose this machine's with --node a\|b"):
        node_to_start(several, None)
    one = msgspec.structs.replace(several, nodes={"a": Machine("h")})
    none: Topology = msgspec.structs.replace(several, nodes={})
    assert (node_to_start(one, None), node_to_start(none, None)) == ("a", None)
    with pytest.raises(UserError, match=r"there is no node c in .*; choose one of a, b"):
        plan_of("c")
    with pytest.raises(UserError, match=r"there is no node a in .*; leave --node out"):
        plan_of("a", text=HEAD)


def test_check_says_which_actors_live_where(plan_of: Plan, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan_of(None)
    assert main(["check", str(tmp_path / "pair.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    a, b = (next(i for i, line in enumerate(lines) if line.startswith(f"  node    {name} at 127.77.")) for name in "ab")
    assert any(line.split() == ["tokenizer"] for line in lines[a:b])
    assert any(line.split() == ["main.scheduler", "port", "9001"] for line in lines[b:])
