"""The grammar actor as a process: answers, limits, and nothing lost when it is killed."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from text_harness import DEADLINE_S, Node
from vocabularies import byte_level_gguf

from llm_runtime.actors.grammar import GrammarCompiler, load_backend, missing
from llm_runtime.actors.messages import Compile, Compiled, Constraint

LEVELS = 1500
SLOW = Constraint(
    "ebnf",
    "root ::= r0\n"
    + "".join(f'r{n} ::= "a" r{n + 1} | r{n + 1} r{n + 1}\n' for n in range(LEVELS))
    + f'r{LEVELS} ::= "z"',
)
"""Takes xgrammar for ever. llguidance counts its work."""
GOOD = Constraint("regex", "[a-z]+")

NewNode = Callable[..., Node]


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[NewNode]:
    nodes = []
    model = byte_level_gguf(tmp_path / "model.gguf", "llama-bpe")

    def start(**config: Any) -> Node:
        settings = {"model": str(model), "vocab_size": 600, **config}
        nodes.append(
            Node(
                tmp_path,
                "llm_runtime.actors.grammar:Grammar",
                "main.grammar",
                settings,
                ["main.scheduler", "b.scheduler"],
            )
        )
        return nodes[-1].start()

    yield start
    for node in nodes:
        node.close()


def test_answers_and_a_death(new_node: NewNode) -> None:
    node = new_node()
    assert node.report == "ready"
    for _ in range(2):  # a second time it is known
        node.send("main.scheduler", Compile(GOOD))
        assert node.receive("main.scheduler", Compiled) == Compiled(GOOD.digest)
    bad = Constraint("regex", "(")
    node.send("main.scheduler", Compile(bad))
    node.send("b.scheduler", Compile(bad))
    for peer in ("main.scheduler", "b.scheduler"):
        answer = node.receive(peer, Compiled)
        assert answer.digest == bad.digest
        assert "unclosed group" in answer.error
    node.kill()
    node.send("main.scheduler", Compile(GOOD))
    node.start()
    assert node.receive("main.scheduler", Compiled) == Compiled(GOOD.digest)
    assert node.stop() == 0


@pytest.mark.skipif(bool(missing("xgrammar")), reason="xgrammar is not installed")
def test_what_takes_too_long_is_refused_and_the_process_ends(new_node: NewNode) -> None:
    node = new_node(limit_s=0.3, backend="xgrammar")
    node.send("main.scheduler", Compile(SLOW))
    node.send("main.scheduler", Compile(GOOD))
    answers = {each.digest: each for each in (node.receive("main.scheduler", Compiled) for _ in range(2))}
    assert answers[GOOD.digest] == Compiled(GOOD.digest), "it does not wait for the other one"
    assert answers[SLOW.digest].error == "The constraint takes longer than 0.3 seconds to compile: make it simpler."
    assert node.process is not None
    assert node.process.wait(DEADLINE_S) == 1
    node.send("main.scheduler", Compile(GOOD))
    node.start()
    assert node.receive("main.scheduler", Compiled) == Compiled(GOOD.digest)


def test_memory_is_limited(new_node: NewNode) -> None:
    node = new_node(limit_bytes=2**28)
    assert node.process is not None
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    soft = next(line for line in limits.splitlines() if line.startswith("Max address space")).split()[3]
    pages = int(Path(f"/proc/{node.process.pid}/statm").read_text().split()[0])
    assert int(soft) <= 4096 * pages + 2**28


def test_a_short_one_is_not_held_up_by_long_ones(tmp_path: Path) -> None:
    """Not even by those that are being compiled."""
    backend = load_backend(byte_level_gguf(tmp_path / "model.gguf", "llama-bpe"), 600)
    begun, go = threading.Event(), threading.Event()

    class Held:
        tokens = backend.tokens
        fill = staticmethod(backend.fill)

        def compile(self, constraint: Constraint) -> Any:
            if constraint != GOOD:
                begun.set()
                assert go.wait(DEADLINE_S)
            return backend.compile(constraint)

    compiler = GrammarCompiler(Held)
    long = [Constraint("regex", f"({'ab|' * 2000}{end})") for end in "xyz"]
    for constraint in long:
        compiler.submit(constraint, "somebody")
    assert begun.wait(DEADLINE_S)
    compiler.submit(GOOD, "somebody")
    answers: list[str] = []

    def wait_for(count: int) -> None:
        while len(answers) < count:
            assert select.select([compiler.fd], [], [], DEADLINE_S)[0]
            answers.extend(answer.digest for _, answer in compiler.finished())

    wait_for(1)
    assert answers == [GOOD.digest]
    go.set()
    wait_for(4)
    assert set(answers) == {each.digest for each in (GOOD, *long)}
