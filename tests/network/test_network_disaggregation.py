"""Prompts computed on another host than the tokens: through a cut cable, kills, and strangers at all ports."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from network_hosts import ADDRESSES, HERE, Hosts, Stream
from support import eventually

from llm_runtime.runtime.plan import plan_node
from llm_runtime.runtime.ports import listening
from llm_runtime.runtime.topology import load_topology

HOSTS = """\
[model]
path = "smollm2-135m-instruct"
dtype = "float32"
deterministic = true
[node.a]
address = "10.77.0.1"
[node.b]
address = "10.77.0.2"
[ingress]
node = "a"
[transport]
keys = "keys"
"""
TOPOLOGY = f"""{HOSTS}
[transfer]
engine = "auto"
[engine.decode]
node = "a"
role = "decode"
kv_tokens = 8192
local_prefill_tokens = 0
prefix_cache = false
[engine.prefill]
node = "b"
role = "prefill"
kv_tokens = 8192
chunk_tokens = 128
prefix_cache = false
"""
UNIFIED = f'{HOSTS}[engine.main]\nnode = "a"\n'
PAGES = 8192 // 16
CUT_S = 4.0
"""Longer than it takes to notice."""


class Ask(NamedTuple):
    """A request: prompt, tokens of the answer, and the seed, 0 for a greedy one."""

    prompt: str
    tokens: int
    seed: int = 0


SHORT = "What is the capital of France?"
LONG = "Count these. " + "".join(f"The quick brown fox jumps over the lazy dog, number {n}. " for n in range(32))
"""About 500 tokens, in four chunks."""
GREEDY = [Ask(SHORT, 8), Ask(LONG, 8)]
DRAWN = [Ask(SHORT, 8, seed=7), Ask(LONG, 8, seed=7)]
STORY = Ask("Tell me a long story about a lighthouse.", 48)
ALL = [*GREEDY, *DRAWN, STORY]

Answers = dict[Ask, str]


def begin(hosts: Hosts, asks: list[Ask]) -> dict[Ask, Stream]:
    drawn = {"temperature": 0.9, "top_p": 0.95}
    return {ask: hosts.ask(ask.prompt, ask.tokens, **(drawn | {"seed": ask.seed} if ask.seed else {})) for ask in asks}


def ends(*streams: dict[Ask, Stream]) -> Answers:
    return {ask: stream.end() for each in streams for ask, stream in each.items()}


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What one engine answers that does both, to all requests."""
    hosts = Hosts(tmp_path_factory.mktemp("u"), UNIFIED)
    try:
        hosts.start("a")
        return ends(begin(hosts, ALL))
    finally:
        hosts.close()


@pytest.fixture(
    scope="module", params=["auto", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mooncake", "nixl"))]
)
def hosts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, unified: Answers
) -> Iterator[Hosts]:
    module = {"auto": "zmq", "mooncake": "mooncake", "nixl": "nixl_cu12"}[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} is not installed")
    hosts = Hosts(tmp_path_factory.mktemp("d"), TOPOLOGY.replace('"auto"', f'"{request.param}"'))
    try:
        hosts.start("a", "b")
        yield hosts
    finally:
        hosts.close()


def starts(hosts: Hosts) -> dict[str, int]:
    return {name: each.incarnation for host in hosts.nodes for name, each in hosts.actors(host).items()}


def released(hosts: Hosts) -> bool:
    """Whether no transfer is under way or ending, on either host, and no page is lent or lost."""
    figures = hosts.metrics()
    return figures["transfers_ending", "decode.scheduler"] == 0 and all(
        (figures["transfers", engine], figures["available_pages", engine]) == (0, PAGES)
        for engine in ("decode.scheduler", "prefill.scheduler")
    )


def test_answers_are_those_of_one_engine(hosts: Hosts, unified: Answers) -> None:
    assert not [name for name in hosts.actors("a") if name.startswith("prefill")]
    assert not [name for name in hosts.actors("b") if name.startswith("decode")]
    assert ends(begin(hosts, ALL)) == unified
    eventually(lambda: released(hosts), "the end of all transfers")
    figures = hosts.metrics()
    assert figures["prefills", "prefill.scheduler"] == figures["transfers_total", "decode.scheduler"] == len(ALL)
    assert figures["kv_received_bytes", "decode.kv_receiver"] > 10**6


@pytest.mark.parametrize("seconds", [CUT_S, pytest.param(10.0, marks=pytest.mark.slow)])
def test_a_cut_cable_changes_no_answer(hosts: Hosts, unified: Answers, seconds: float) -> None:
    before = starts(hosts)
    story = begin(hosts, [STORY])
    story[STORY].read(8)
    early = begin(hosts, GREEDY)
    eventually(lambda: hosts.metric("decode.scheduler", "transfers") > 0, "prompts under way")
    hosts.cut()
    try:
        began = time.monotonic()
        late = begin(hosts, DRAWN)
        assert story[STORY].running
        answer = ends(story)[STORY]  # what is decoded does not need the other host
        time.sleep(max(0.0, began + seconds - time.monotonic()))  # the cut itself
        assert all(stream.running for stream in late.values())
    finally:
        hosts.mend()
    assert {STORY: answer, **ends(early, late)} == unified
    eventually(lambda: released(hosts), "the end of all transfers")
    assert starts(hosts) == before


@pytest.mark.slow
def test_without_the_other_host_prompts_are_computed_here(hosts: Hosts, unified: Answers) -> None:
    begun = begin(hosts, GREEDY)
    hosts.cut()
    try:
        late = begin(hosts, DRAWN)
        assert ends(begun, late).items() <= unified.items()
    finally:
        hosts.mend()
    eventually(lambda: released(hosts), "the end of all transfers")
    eventually(lambda: hosts.metric("decode.scheduler", "prefill_engines") == 1, "the prefill engine")
    before = hosts.metric("decode.scheduler", "transfers_total")
    assert ends(begin(hosts, GREEDY)).items() <= unified.items()
    eventually(lambda: hosts.metric("decode.scheduler", "transfers_total") > before, "a prompt computed there again")


@pytest.mark.parametrize("actor", ["prefill.kv_sender", pytest.param("prefill.scheduler", marks=pytest.mark.slow)])
def test_a_kill_changes_no_answer(hosts: Hosts, unified: Answers, actor: str) -> None:
    before = starts(hosts)[actor]
    load = begin(hosts, GREEDY)
    eventually(lambda: hosts.metric("decode.scheduler", "transfers") > 0, "prompts under way")
    hosts.kill("b", actor)
    assert ends(load).items() <= unified.items()
    eventually(lambda: released(hosts), "the end of all transfers")
    assert starts(hosts)[actor] > before


def test_strangers_disturb_nobody(hosts: Hosts, unified: Answers) -> None:
    """The ports of the library that moves pages know no keys: what comes there must at least not end the processes."""
    mailboxes = listening(plan_node(load_topology(hosts.file)))
    before = starts(hosts)
    attackers = []
    for host, origin, mover in (("a", "b", "decode.kv_receiver"), ("b", "a", "prefill.kv_sender")):
        actors = hosts.actors(host)
        ports = hosts.ports(host, mover) | {port for actor, port in mailboxes.items() if actor in actors}
        assert len(ports) > len(mailboxes.keys() & actors.keys())
        arguments = [str(HERE / "attacker.py"), ADDRESSES[host], "2", *map(str, ports)]
        attackers.append(hosts.on(origin, arguments, stdout=subprocess.PIPE))
    assert ends(begin(hosts, DRAWN)).items() <= unified.items()
    assert min(int(attacker.communicate(timeout=60)[0]) for attacker in attackers) > 10
    assert starts(hosts) == before

    def refused() -> bool:
        figures = hosts.metrics()
        assert not any(figures["messages_malformed", actor] for actor in mailboxes)
        return all(figures["messages_refused", actor] > 10 for actor in mailboxes)

    eventually(refused, "all actors to refuse")
    assert ends(begin(hosts, [ALL[0]])).items() <= unified.items()
    eventually(lambda: released(hosts), "the end of all transfers")
    assert starts(hosts) == before
