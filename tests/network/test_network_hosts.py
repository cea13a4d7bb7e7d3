"""A model served by two hosts whose cable is cut, whose nodes are stopped, and at whose ports strangers knock."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from network_hosts import ADDRESSES, HERE, Hosts, Stream
from support import eventually

from llm_runtime.runtime.plan import plan_node
from llm_runtime.runtime.ports import listening
from llm_runtime.runtime.topology import load_topology

PROMPT, TOKENS = "Tell me a long story about a lighthouse.", 48
CUT_S = 4.0
"""Longer than it takes to notice."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("h"))
    try:
        hosts.start("a", "b")
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts) -> str:
    return hosts.ask(PROMPT, TOKENS).end()


@pytest.fixture
def stream(hosts: Hosts, undisturbed: str) -> Iterator[Stream]:
    """The same chat, under way."""
    stream = hosts.ask(PROMPT, TOKENS)
    try:
        stream.read(10)
        yield stream
    finally:
        stream.close()


def starts(hosts: Hosts) -> dict[str, int]:
    return {name: each.incarnation for host in hosts.nodes for name, each in hosts.actors(host).items()}


def test_each_host_runs_its_part(hosts: Hosts, undisturbed: str) -> None:
    assert len(undisturbed) > TOKENS
    assert {"main.scheduler", "main.rank0"} <= hosts.actors("b").keys()
    assert {"bootstrap", "detokenizer", "tokenizer", "ingress0"} <= hosts.actors("a").keys()
    assert not hosts.actors("a").keys() & hosts.actors("b").keys() - {"root"}


def test_a_stream_survives_a_cut_cable(hosts: Hosts, undisturbed: str, stream: Stream) -> None:
    before = starts(hosts)
    hosts.cut()
    try:
        time.sleep(CUT_S)  # the cut itself
        late = hosts.ask("What is the capital of France?", 12)  # comes while the engine is out of reach
        assert stream.running
    finally:
        hosts.mend()
    assert stream.end() == undisturbed
    assert "Paris" in late.end()
    assert starts(hosts) == before


@pytest.mark.parametrize(("host", "actor"), [("b", "main.scheduler"), ("a", "detokenizer"), ("a", "bootstrap")])
def test_a_stream_survives_a_killed_actor(
    hosts: Hosts, undisturbed: str, stream: Stream, host: str, actor: str
) -> None:
    hosts.kill(host, actor)
    assert stream.end() == undisturbed


def test_a_stream_survives_the_end_of_the_engines_node(hosts: Hosts, undisturbed: str, stream: Stream) -> None:
    """Its new run directory counts starts from 1 again, and the other node must not take that for old frames."""
    hosts.stop("b")
    hosts.start("b")
    assert stream.end() == undisturbed
    assert {each.restarts for each in hosts.actors("b").values()} == {0}


def test_strangers_get_nothing_through(hosts: Hosts, undisturbed: str) -> None:
    loaded = load_topology(hosts.file)
    ports = listening(plan_node(loaded))
    before = starts(hosts)
    memory = {name: each.rss_bytes for host in "ab" for name, each in hosts.actors(host).items()}
    attackers = []
    for victim, origin in (("a", "b"), ("b", "a")):
        theirs = [str(port) for actor, port in ports.items() if actor.startswith("main.") == (victim == "b")]
        assert theirs
        arguments = [str(HERE / "attacker.py"), ADDRESSES[victim], "3", *theirs]
        attackers.append(hosts.on(origin, arguments, stdout=subprocess.PIPE))
    assert hosts.ask(PROMPT, TOKENS).end() == undisturbed
    attempts = [int(attacker.communicate(timeout=60)[0]) for attacker in attackers]
    assert min(attempts) > 20
    assert starts(hosts) == before
    for actor in ports:
        eventually(lambda actor=actor: hosts.metric(actor, "messages_refused") > 20, f"{actor} to refuse")  # type: ignore[misc]
        assert hosts.metric(actor, "messages_malformed") == 0
        assert hosts.metric(actor, "messages_stale") == 0
    assert hosts.ask(PROMPT, TOKENS).end() == undisturbed
    growth = {
        name: each.rss_bytes - memory[name]
        for host in "ab"
        for name, each in hosts.actors(host).items()
        if name in ports
    }
    assert max(growth.values()) < 64 * 2**20, growth


def test_figures_of_both_hosts_are_known_to_the_ingress(hosts: Hosts) -> None:
    eventually(lambda: hosts.metric("main.rank0", "alive_seconds") > 0, "figures of the rank")
    status = [sys.executable, "-m", "llm_runtime", "status", "--node", "pair-b", "--json"]
    ran = subprocess.run(status, env=hosts.environment, capture_output=True, text=True, timeout=30, check=True)
    report = json.loads(ran.stdout)
    assert (report["node"], report["url"], report["state"]) == ("pair-b", "", "running")
