"""The scheduler of a decode engine among its peers: whom it asks, what it lends, and when it has that back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stage import NUM_PAGES, PAGE_SIZE, Stage, generate

from llm_runtime.actors.messages import (
    Abort,
    CancelReceive,
    EngineInfo,
    Hello,
    Prefill,
    Prefilled,
    PrefillRefused,
    Receive,
    ReceiveCancelled,
    Received,
    ReceiveFailed,
    Refused,
    Registry,
    Release,
    Released,
    Step,
)
from llm_runtime.actors.scheduler import transfers
from llm_runtime.actors.scheduler.decode import DecodeScheduler

PREFILLS = ("p.scheduler", "q.scheduler")
RECEIVER = "main.kv_receiver"


class DecodeStage(Stage):
    peers = ("ingress0", "main.rank0", "detokenizer", "bootstrap", *PREFILLS, RECEIVER)
    kind = DecodeScheduler

    def __init__(self, directory: Path, shared: bool, engines: int = 1, **settings: Any) -> None:
        settings |= {"shared_kv": shared, "prefill_schedulers": list(PREFILLS), "first_page": 100 if shared else 0}
        super().__init__(directory, role="decode", transfer=RECEIVER, **settings)
        self.register(engines)

    def register(self, engines: int) -> None:
        infos = [info(name) for name in PREFILLS[:engines]]
        self.send("bootstrap", Registry(infos))
        self.until(lambda: len(self.scheduler.transfers.engines) == engines)

    def asked(self, peer: str = "p.scheduler", skip: int = 0) -> Prefill:
        found: Prefill = self.expect(peer, Prefill, skip)
        return found

    @property
    def available(self) -> int:
        return int(self.scheduler.pool.available)


def info(scheduler: str) -> EngineInfo:
    engine = scheduler.partition(".")[0]
    sender = f"{engine}.kv_sender"
    return EngineInfo(engine, "prefill", scheduler, "", "m", "fingerprint", 1, PAGE_SIZE, 32, 100, transfer=sender)


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DecodeStage]:
    made = DecodeStage(tmp_path, **getattr(request, "param", {"shared": True}))
    yield made
    made.close()


both = pytest.mark.parametrize("stage", [{"shared": True}, {"shared": False}], indirect=True, ids=["shared", "copied"])


@both
def test_a_prompt_is_computed_elsewhere_and_decoded_here(stage: DecodeStage) -> None:
    stage.send("ingress0", generate(prompt=6))
    asked = stage.asked()
    pages = np.frombuffer(asked.pages, np.int32).tolist()
    receive: Receive = stage.expect(RECEIVER, Receive)
    assert (asked.transfer, asked.receiver, asked.held, asked.prompt_len) == (receive.transfer, RECEIVER, 0, 6)
    assert (receive.sender, receive.first, len(receive.pages)) == ("p.kv_sender", 0, 2 * 4)
    assert pages == (np.frombuffer(receive.pages, np.int32).tolist() if stage.scheduler.config.shared_kv else [])
    assert all(100 <= page < 100 + NUM_PAGES for page in pages)
    stage.send("p.scheduler", Prefilled(asked.transfer, 7))
    stage.until(lambda: stage.scheduler.transfers.active[asked.transfer].answer)
    assert not stage.steps(), "the KV is not there yet"
    stage.send(RECEIVER, Received(asked.transfer))
    step: Step = stage.expect("main.rank0", Step)
    assert np.frombuffer(step.starts, np.int32).tolist() == [6]
    assert np.frombuffer(step.tokens, np.int32).tolist() == [7]
    assert stage.expect("p.scheduler", Release).transfer == asked.transfer
    stage.generate_all()
    assert [(e.index, e.tokens, e.finish) for e in stage.events()] == [
        (0, [7], None),
        (1, [5], None),
        (2, [5], "length"),
    ]
    assert not stage.scheduler.ledger.lent.any()
    assert stage.available == NUM_PAGES


@both
def test_what_the_decode_engine_holds_is_not_asked_for(stage: DecodeStage) -> None:
    for rid in ("first", "second"):
        stage.send("ingress0", generate(rid, prompt=11))
        asked = stage.asked(skip=0 if rid == "first" else 1)
        assert asked.held == (0 if rid == "first" else 8)
        stage.send("p.scheduler", Prefilled(asked.transfer, 7, asked.held))
        stage.send(RECEIVER, Received(asked.transfer))
        stage.generate_all()
    assert [event.cached_tokens for event in stage.events() if event.index == 0] == [0, 8]


@both
def test_pages_of_an_aborted_request_come_back_when_nobody_writes_into_them(stage: DecodeStage) -> None:
    writer, other = ("p.scheduler", RECEIVER) if stage.scheduler.config.shared_kv else (RECEIVER, "p.scheduler")
    stage.send("ingress0", generate(prompt=6))
    asked = stage.asked()
    stage.send("ingress0", Abort("r"))
    stage.expect("p.scheduler", Release)
    stage.expect(RECEIVER, CancelReceive)
    assert stage.available == NUM_PAGES - 2
    answers = {"p.scheduler": Released(asked.transfer), RECEIVER: ReceiveCancelled(asked.transfer)}
    stage.send(other, answers[other])
    stage.until(lambda: len(stage.scheduler.transfers.settling) == 1)
    assert stage.available == NUM_PAGES - 2
    stage.send(writer, answers[writer])
    stage.until(lambda: stage.available == NUM_PAGES)


@both
def test_pages_are_lent_when_steps_that_were_sent_do_not_write_into_them_any_more(stage: DecodeStage) -> None:
    stage.send("ingress0", generate("first", prompt=6, max_tokens=50))
    asked = stage.asked()
    stage.send("p.scheduler", Prefilled(asked.transfer, 7))
    stage.send(RECEIVER, Received(asked.transfer))
    ahead: Step = stage.expect("main.rank0", Step, skip=1)
    stage.send("ingress0", Abort("first"))
    stage.until(lambda: stage.available == NUM_PAGES)
    stage.send("ingress0", generate("given up", prompt=6))
    stage.until(lambda: stage.scheduler.batch.departing)
    stage.send("ingress0", Abort("given up"))
    stage.until(lambda: stage.available == NUM_PAGES)
    stage.send("ingress0", generate("second", prompt=6))
    stage.until(lambda: stage.scheduler.batch.departing)
    stage.answer(stage.steps()[0])
    stage.until(lambda: stage.scheduler.in_flight[0].number == ahead.number)
    (departure,) = stage.scheduler.batch.departing
    assert departure.after == ahead.number
    assert len([m for m in stage.received["p.scheduler"] if isinstance(m, Prefill)]) == 1
    stage.answer(ahead)
    again = stage.asked(skip=1)
    assert not stage.scheduler.batch.departing
    stage.send("p.scheduler", Prefilled(again.transfer, 7))
    stage.send(RECEIVER, Received(again.transfer))
    stage.generate_all()
    assert stage.available == NUM_PAGES


@both
def test_a_restarted_scheduler_uses_lent_pages_when_nobody_writes_into_them(stage: DecodeStage) -> None:
    shared = stage.scheduler.config.shared_kv
    stage.send("ingress0", generate(prompt=6))
    stage.asked()
    stage.scheduler.mailbox.close()
    for got in stage.received.values():
        got.clear()
    stage.scheduler = stage.start(2)
    assert stage.available == NUM_PAGES - 2
    peers = PREFILLS if shared else (RECEIVER,)
    for peer in peers:
        assert stage.available == NUM_PAGES - 2
        if shared:
            stage.send(peer, Released(stage.expect(peer, Release).transfer))
        else:
            stage.send(peer, ReceiveCancelled(stage.expect(peer, CancelReceive).transfer))
    stage.until(lambda: stage.available == NUM_PAGES)


def test_a_restarted_prefill_engine_is_asked_again(stage: DecodeStage) -> None:
    stage.send("p.scheduler", Hello())
    stage.send("ingress0", generate(prompt=6))
    first = stage.asked()
    stage.restart("p.scheduler")
    stage.send("p.scheduler", Hello())
    second = stage.asked(skip=1)
    assert second.transfer != first.transfer
    stage.send("p.scheduler", Prefilled(first.transfer, 9))  # comes too late
    stage.send("p.scheduler", Prefilled(second.transfer, 7))
    stage.send(RECEIVER, Received(second.transfer))
    stage.generate_all()
    assert stage.events()[0].tokens == [7]


@pytest.mark.parametrize("failure", [ReceiveFailed("", "lost"), Released("")], ids=["receive failed", "dropped"])
def test_a_transfer_that_fails_is_begun_again(stage: DecodeStage, failure: ReceiveFailed | Released) -> None:
    stage.send("ingress0", generate(prompt=6))
    first = stage.asked()
    failure.transfer = first.transfer
    stage.send(RECEIVER if isinstance(failure, ReceiveFailed) else "p.scheduler", failure)
    assert stage.asked(skip=1).transfer != first.transfer


def test_a_prompt_whose_kv_gets_lost_again_and_again_is_computed_here(stage: DecodeStage) -> None:
    stage.send("ingress0", generate(prompt=6))
    for number in range(transfers.MAX_FAILED):
        stage.send(RECEIVER, ReceiveFailed(stage.asked(skip=number).transfer, "lost"))
        for peer in ("p.scheduler", RECEIVER):
            kind, answer = (Release, Released) if peer != RECEIVER else (CancelReceive, ReceiveCancelled)
            for message in stage.received[peer]:
                if isinstance(message, kind):
                    stage.send(peer, answer(message.transfer))
    stage.answer(stage.expect("main.rank0", Step))
    stage.until(lambda: stage.events() and stage.events()[0].tokens == [5])


def test_what_is_not_answered_is_asked_again(stage: DecodeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.send("ingress0", generate(prompt=6))
    first = stage.asked()
    again = stage.asked(skip=1)
    assert again == first
    assert stage.expect(RECEIVER, Receive, skip=1).transfer == first.transfer


def test_a_refusal_reaches_the_client(stage: DecodeStage) -> None:
    stage.send("ingress0", generate(prompt=6))
    stage.send("p.scheduler", PrefillRefused(stage.asked().transfer, 500, "It crashed."))
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.status, refused.message) == ("r", 500, "It crashed.")


@pytest.mark.parametrize("stage", [{"shared": False, "engines": 2}], indirect=True)
def test_prompts_go_where_their_prefix_is_unless_others_wait_there(stage: DecodeStage) -> None:
    def ask(rid: str, prompt: int, extra_key: str) -> str:
        stage.send("ingress0", generate(rid, prompt=prompt, extra_key=extra_key))
        before = set(stage.scheduler.transfers.active)
        stage.until(lambda: set(stage.scheduler.transfers.active) - before)
        (new,) = set(stage.scheduler.transfers.active) - before
        return str(stage.scheduler.transfers.active[new].scheduler)

    def finish() -> None:
        for transfer, entry in list(stage.scheduler.transfers.active.items()):
            stage.send(entry.scheduler, Prefilled(transfer, 2))
            stage.send(RECEIVER, Received(transfer))
        stage.generate_all()

    assert ask("a", 20, "a") == "p.scheduler"
    assert ask("b", 10, "b") == "q.scheduler", "the other one has 20 tokens to compute"
    finish()
    stage.scheduler.pool.give_back(stage.scheduler.pool.tree.evict(NUM_PAGES))
    assert ask("b again", 10, "b") == "q.scheduler", "it has the pages"
    assert ask("c", 10, "c") == "p.scheduler", "q is busy"


def test_without_a_prefill_engine_prompts_wait_and_then_are_computed_here(
    stage: DecodeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "GRACE_S", -1.0)
    stage.scheduler.registry(Registry([]), "bootstrap")
    assert not stage.scheduler.transfers.engines
    stage.send("ingress0", generate(prompt=6))
    stage.until(lambda: stage.scheduler.batch.waiting)
    assert not stage.steps()
    monkeypatch.setattr(transfers, "PATIENCE_S", 0.0)
    step: Step = stage.expect("main.rank0", Step)
    assert np.frombuffer(step.lengths, np.int32).tolist() == [6]


@pytest.mark.parametrize("stage", [{"shared": True, "local_prefill_tokens": 6}], indirect=True)
def test_little_is_computed_here(stage: DecodeStage) -> None:
    stage.send("ingress0", generate(prompt=6))
    step: Step = stage.expect("main.rank0", Step)
    assert np.frombuffer(step.lengths, np.int32).tolist() == [6]
    stage.send("ingress0", generate("s", prompt=7, extra_key="other"))
    assert stage.asked().prompt_len == 7
