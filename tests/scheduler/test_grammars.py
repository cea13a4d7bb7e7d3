"""Requests with constraints: held until the ranks are ready for them, refused when they never will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from stage import PEERS, Stage, generate

from llm_runtime.actors.messages import Compile, Compiled, Constraint, Hello, Refused
from llm_runtime.actors.scheduler import grammars
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.grammars import Grammars
from llm_runtime.actors.scheduler.request import Request

GRAMMAR = "main.grammar"
GOOD = Constraint("regex", "a+")
BAD = Constraint("regex", "(")


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Peers:
    """`Grammars` with the test in the place of the others."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Constraint]] = []
        config = Config("main", "m", "ipc://x", "main.rank0", "bootstrap", 4, 32, 100, grammar=GRAMMAR)
        self.grammars = Grammars(config, self.send)
        self.count = 0

    def send(self, peer: str, message: Any) -> bool:
        assert isinstance(message, Compile)
        self.sent.append((peer, message.constraint))
        return True

    def take(self) -> list[tuple[str, Constraint]]:
        sent, self.sent = self.sent, []
        return sent

    def hold(self, constraint: Constraint) -> tuple[Request, str]:
        self.count += 1
        message = generate(f"r{self.count}", sampling=params(constraint))
        request = Request(message, "ingress0", self.count, 4)
        return request, self.grammars.hold(request)

    def answer(self, peer: str, constraint: Constraint, error: str = "") -> list[tuple[Request, str]]:
        return self.grammars.compiled(Compiled(constraint.digest, error), peer)


def params(constraint: Constraint | None) -> Any:
    return structs.replace(generate().sampling, constraint=constraint)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(grammars, "time", clock)
    return clock


@pytest.fixture
def peers(clock: Time) -> Peers:
    peers = Peers()
    assert peers.grammars.grammar_started(1) == []
    return peers


def test_first_the_grammar_actor_then_the_rank(peers: Peers) -> None:
    request, error = peers.hold(GOOD)
    other, _ = peers.hold(GOOD)
    assert (request.held, error) == (True, "")
    assert peers.take() == [(GRAMMAR, GOOD)]
    assert peers.answer(GRAMMAR, GOOD) == []
    assert peers.take() == [("main.rank0", GOOD)]
    assert request.held
    peers.answer("main.rank0", GOOD)
    assert not request.held
    assert not other.held
    later, error = peers.hold(GOOD)
    assert (later.held, error, peers.take()) == (False, "", [])


def test_a_refusal_is_for_all_who_wait_and_is_remembered_for_a_while(peers: Peers, clock: Time) -> None:
    first, second = peers.hold(BAD)[0], peers.hold(BAD)[0]
    assert peers.answer(GRAMMAR, BAD, "it is bad") == [(first, "it is bad"), (second, "it is bad")]
    peers.take()
    assert peers.hold(BAD)[1] == "it is bad"
    assert peers.take() == []
    clock.now += 61
    assert peers.hold(BAD)[1] == ""
    assert peers.take() == [(GRAMMAR, BAD)]


def test_none_waits_for_another_one(peers: Peers) -> None:
    peers.hold(BAD)
    peers.hold(GOOD)
    assert peers.take() == [(GRAMMAR, BAD), (GRAMMAR, GOOD)]
    peers.answer(GRAMMAR, GOOD)
    assert peers.take() == [("main.rank0", GOOD)]


def test_a_constraint_that_is_only_checked_is_held_like_any_other(peers: Peers) -> None:
    message = generate("r", sampling=structs.replace(generate().sampling, checked=BAD))
    request = Request(message, "ingress0", 1, 4)
    assert peers.grammars.hold(request) == ""
    assert request.held
    assert peers.answer(GRAMMAR, BAD, "it is bad") == [(request, "it is bad")]


def test_what_the_grammar_actor_dies_of_fails_alone(peers: Peers, clock: Time) -> None:
    killer, _ = peers.hold(BAD)
    innocent, _ = peers.hold(GOOD)
    assert peers.take() == [(GRAMMAR, BAD), (GRAMMAR, GOOD)]
    for incarnation in (2, 3):
        assert peers.grammars.grammar_started(incarnation) == []
        assert peers.take() == [(GRAMMAR, BAD)], "it may have been killed by somebody else"
    ((refused, reason),) = peers.grammars.grammar_started(4)
    assert refused is killer
    assert "crashes" in reason
    clock.now += 1.1
    peers.grammars.repeat()
    assert peers.take() == [(GRAMMAR, GOOD)]
    peers.answer(GRAMMAR, GOOD)
    peers.answer("main.rank0", GOOD)
    assert not innocent.held


def test_constraints_that_crash_the_compiler_do_not_keep_it_crashing(peers: Peers, clock: Time) -> None:
    """The supervisor bears 30 restarts in 10 seconds."""
    for number in range(100):
        peers.hold(Constraint("regex", f"({number}"))
    deaths, incarnation, began = 0, 1, clock.now
    while clock.now < began + 10:
        if peers.take():
            deaths, incarnation = deaths + 1, incarnation + 1
            peers.grammars.grammar_started(incarnation)
        else:
            clock.now += 0.1
            peers.grammars.repeat()
    assert 3 <= deaths <= 15


def test_what_is_not_answered_is_asked_again(peers: Peers, clock: Time) -> None:
    peers.hold(GOOD)
    peers.take()
    peers.grammars.repeat()
    assert peers.take() == []
    clock.now += 1.1
    peers.grammars.repeat()
    assert peers.take() == [(GRAMMAR, GOOD)]
    peers.answer(GRAMMAR, GOOD)
    peers.take()
    clock.now += 1.1
    peers.grammars.repeat()
    assert peers.take() == [("main.rank0", GOOD)]


def test_a_new_rank_is_asked_for_what_requests_wait_for(peers: Peers) -> None:
    ready, waiting = GOOD, Constraint("regex", "b")
    peers.hold(ready)
    peers.answer(GRAMMAR, ready)
    peers.answer("main.rank0", ready)
    request, _ = peers.hold(waiting)
    peers.answer(GRAMMAR, waiting)
    peers.take()
    peers.grammars.leader_started()
    assert peers.take() == [("main.rank0", waiting)]
    peers.answer("main.rank0", waiting)
    assert not request.held
    assert peers.hold(ready)[0].held, "the new rank does not have it"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(Stage, "peers", (*PEERS, GRAMMAR))
    made = Stage(tmp_path, grammar=GRAMMAR)
    yield made
    made.scheduler.mailbox.close()
    for mailbox in made.mailboxes.values():
        mailbox.close()


def answer_all(stage: Stage, wanted: Callable[[], Any]) -> None:
    """Answers every step until something is so."""
    answered: set[int] = set()

    def look() -> Any:
        for step in stage.steps():
            if step.number not in answered:
                answered.add(step.number)
                stage.answer(step)
        return wanted()

    stage.until(look)


def test_a_held_request_lets_others_pass_and_runs_when_its_constraint_is_ready(stage: Stage) -> None:
    stage.send("ingress0", generate("held", sampling=params(GOOD)))
    stage.send("ingress0", generate("free", prompt=5))
    assert stage.expect(GRAMMAR, Compile).constraint == GOOD
    answer_all(stage, lambda: [event for event in stage.events() if event.finish])
    assert {event.rid for event in stage.events()} == {"free"}
    stage.send(GRAMMAR, Compiled(GOOD.digest))
    assert stage.expect("main.rank0", Compile).constraint == GOOD
    assert not stage.scheduler.batch.running
    stage.send("main.rank0", Compiled(GOOD.digest))
    before = len(stage.steps())
    step = stage.until(lambda: stage.steps()[before:])[0]
    (opening,) = step.new_requests
    assert opening.sampling.constraint == GOOD
    assert len(opening.history) == 4 * 6


def test_a_refused_constraint_is_an_answer_400_and_the_request_is_forgotten(stage: Stage) -> None:
    stage.send("ingress0", generate("r", sampling=params(BAD)))
    stage.expect(GRAMMAR, Compile)
    stage.send(GRAMMAR, Compiled(BAD.digest, "it is bad"))
    assert stage.expect("ingress0", Refused) == Refused("r", 0, 400, "it is bad")
    assert not stage.scheduler.requests
    assert not stage.scheduler.batch.waiting
    stage.send("ingress0", generate("again", sampling=params(BAD)))
    assert stage.expect("ingress0", Refused, skip=1).message == "it is bad"


def test_a_restarted_grammar_actor_and_rank_are_asked_again(stage: Stage) -> None:
    stage.send(GRAMMAR, Hello())
    stage.send("ingress0", generate("r", sampling=params(GOOD)))
    stage.expect(GRAMMAR, Compile)
    stage.restart(GRAMMAR)
    stage.send(GRAMMAR, Hello())
    stage.expect(GRAMMAR, Compile, skip=1)
    stage.send(GRAMMAR, Compiled(GOOD.digest))
    stage.expect("main.rank0", Compile)
    stage.restart("main.rank0")
    stage.send("main.rank0", stage.attached())
    stage.expect("main.rank0", Compile, skip=1)
    stage.send("main.rank0", Compiled(GOOD.digest))
    assert stage.until(stage.steps)[0].new_requests[0].sampling.constraint == GOOD
