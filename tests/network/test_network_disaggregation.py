"""Prompts computed on another host than the tokens: through a cut cable, kills, and strangers at all ports."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from network_hosts import ADDRESSES, HERE, Hosts, Stream, eventually

from runtime.plan import plan_node
from runtime.ports import listening
from runtime.topology import load_topology

TOPOLOGY = """\
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
[transfer]
engine = "mooncake"
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
[transport]
keys = "keys"
"""
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
STORY = Ask("Tell me a long story about a lighthouse.", 64)
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
    hosts = Hosts(tmp_path_factory.mktemp("u"))
    try:
        hosts.start("a", "b")
        return ends(begin(hosts, ALL))
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, unified: Answers) -> Iterator[Hosts]:
    if importlib.util.find_spec("mooncake") is None:
        pytest.skip("the package mooncake is not installed")
    hosts = Hosts(tmp_path_factory.mktemp("d"), TOPOLOGY)
    try:
        hosts.start("a", "b")
        yield hosts
    finally:
        hosts.close()


def starts(hosts: Hosts) -> dict[str, int]:
    return {name: each.incarnation for host in hosts.nodes for name, each in hosts.actors(host).items()}


def released(hosts: Hosts) -> bool:
    """Whether no transfer is under way or ending, on either host, and no page is lent or lost."""
    engines = {"decode.scheduler", "prefill.scheduler"}
    return (
        hosts.metrics("transfers") == dict.fromkeys(engines, 0.0)
        and hosts.metric("decode.scheduler", "transfers_ending") == 0
        and hosts.metrics("available_pages") == dict.fromkeys(engines, float(PAGES))
    )


def test_answers_are_those_of_one_engine(hosts: Hosts, unified: Answers) -> None:
    assert not [name for name in hosts.actors("a") if name.startswith("prefill")]
    assert not [name for name in hosts.actors("b") if name.startswith("decode")]
    assert ends(begin(hosts, ALL)) == unified
    eventually(lambda: released(hosts), "the end of all transfers")
    assert hosts.metric("prefill.scheduler", "prefills") == len(ALL)
    assert hosts.metric("decode.scheduler", "transfers_total") == len(ALL)
    assert hosts.metric("decode.kv_receiver", "kv_received_bytes") > 10**6


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


@pytest.mark.parametrize("actor", ["prefill.scheduler", "prefill.kv_sender"])
def test_a_kill_changes_no_answer(hosts: Hosts, unified: Answers, actor: str) -> None:
    before = starts(hosts)[actor]
    load = begin(hosts, [*GREEDY, *DRAWN])
    eventually(lambda: hosts.metric("decode.scheduler", "transfers") > 0, "prompts under way")
    hosts.kill("b", actor)
    assert ends(load).items() <= unified.items()
    eventually(lambda: released(hosts), "the end of all transfers")
    assert starts(hosts)[actor] > before


def test_strangers_disturb_nobody(hosts: Hosts, unified: Answers) -> None:
    """Mooncake's own ports know no keys: what comes there must at least not end the processes."""
    mailboxes = listening(plan_node(load_topology(hosts.file)))
    before = starts(hosts)
    attackers = []
    for host, origin, mover in (("a", "b", "decode.kv_receiver"), ("b", "a", "prefill.kv_sender")):
        actors = hosts.actors(host)
        ports = hosts.ports(host, mover) | {port for actor, port in mailboxes.items() if actor in actors}
        assert len(ports) == 2 + len(mailboxes.keys() & actors.keys())
        arguments = [str(HERE / "attacker.py"), ADDRESSES[host], "2", *map(str, ports)]
        attackers.append(hosts.on(origin, arguments, stdout=subprocess.PIPE))
    assert ends(begin(hosts, [*GREEDY, *DRAWN])).items() <= unified.items()
    assert min(int(attacker.communicate(timeout=60)[0]) for attacker in attackers) > 10
    assert starts(hosts) == before
    for actor in mailboxes:
        eventually(lambda actor=actor: hosts.metric(actor, "messages_refused") > 10, f"{actor} to refuse")  # type: ignore[misc]
        assert hosts.metric(actor, "messages_malformed") == 0
    assert ends(begin(hosts, GREEDY)).items() <= unified.items()
    eventually(lambda: released(hosts), "the end of all transfers")
    assert starts(hosts) == before
