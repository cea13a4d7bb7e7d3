"""The bootstrap server as a process: engines come, change, disagree and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from text_harness import Node

from llm_runtime.actors.messages import EngineInfo, Hello, Register, Registry

NewNode = Callable[..., Node]
ENGINES = ["a", "b", "c"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    peers = ["ingress0", "ingress1", *(f"{engine}.scheduler" for engine in ENGINES)]
    node = Node(tmp_path, "llm_runtime.actors.bootstrap:Bootstrap", "bootstrap", {"forget_s": 2.0}, peers)
    node.start()
    yield node
    node.close()


def info(engine: str, role: Any = "unified", fingerprint: str = "f", model: str = "m", **fields: Any) -> EngineInfo:
    return EngineInfo(
        engine=engine,
        role=role,
        scheduler=f"{engine}.scheduler",
        address=f"ipc:///{engine}",
        model=model,
        fingerprint=fingerprint,
        tp=1,
        page_size=16,
        num_pages=100,
        max_model_len=1000,
        **fields,
    )


def register(node: Node, *engines: EngineInfo) -> None:
    for engine in engines:
        node.send(engine.scheduler, Register(engine))


def wait_for(node: Node, accept: Callable[[dict[str, EngineInfo]], bool], *alive: EngineInfo, ingress: int = 0) -> None:
    """Waits for a registry that is accepted, while the living engines send their heartbeats."""

    def accepted() -> bool:
        register(node, *alive)
        registry = node.receive(f"ingress{ingress}", Registry)
        return accept({engine.engine: engine for engine in registry.engines})

    eventually(accepted, "such a registry")


def test_engines_come_change_and_go(node: Node) -> None:
    one, two = info("a"), info("b", model="other")
    for ingress in (0, 1):
        wait_for(node, lambda engines: engines == {"a": one, "b": two}, one, two, ingress=ingress)
    busy = info("a", waiting=3, running=7)
    wait_for(node, lambda engines: engines == {"a": busy, "b": two}, busy, two)
    wait_for(node, lambda engines: engines == {"a": busy}, busy)  # b is silent
    wait_for(node, lambda engines: engines == {})


def test_an_ingress_that_starts_is_told_at_once(node: Node) -> None:
    one = info("a")
    wait_for(node, lambda engines: "a" in engines, one)
    node.add_peer("ingress0", incarnation=2)
    node.send("ingress0", Hello())
    assert node.receive("ingress0", Registry).engines == [one]


def test_prefill_and_decode_must_agree(node: Node) -> None:
    prefill = info("a", role="prefill", fingerprint="bf16")
    wrong = info("b", role="decode", fingerprint="int8")
    unified = info("c", role="unified", fingerprint="int8")
    wait_for(node, lambda engines: set(engines) == {"a"}, prefill)
    wait_for(node, lambda engines: set(engines) == {"a", "c"}, prefill, wrong, unified)  # who is there first counts
    right = info("b", role="decode", fingerprint="bf16")
    wait_for(node, lambda engines: set(engines) == {"a", "b", "c"}, prefill, right, unified)
    # b comes back as another one, and is not listed any more; when a is gone it is
    wait_for(node, lambda engines: set(engines) == {"a", "c"}, prefill, wrong, unified)
    wait_for(node, lambda engines: set(engines) == {"b", "c"}, wrong, unified)


def test_killed_and_filled_again_before_it_speaks(node: Node) -> None:
    one, two = info("a"), info("b")
    wait_for(node, lambda engines: set(engines) == {"a", "b"}, one, two)
    node.kill()
    list(node.peers["ingress0"].receive())
    node.start()
    register(node, one)
    register(node, two)
    first = node.receive("ingress0", Registry)
    assert {engine.engine for engine in first.engines} == {"a", "b"}
