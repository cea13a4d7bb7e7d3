"""The scheduler of a prefill engine among its peers: what it offers, how long it holds it, and when it lets go."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from stage import NUM_PAGES, PAGE_SIZE, Stage

from llm_runtime.actors.messages import (
    Attached,
    Hello,
    Offer,
    Prefill,
    Prefilled,
    PrefillRefused,
    Release,
    Released,
    SamplingParams,
    Step,
    Withdraw,
    Withdrawn,
)
from llm_runtime.actors.scheduler import prefill
from llm_runtime.actors.scheduler.prefill import PrefillScheduler

DECODE, SENDER = "d.scheduler", "main.kv_sender"


class PrefillStage(Stage):
    peers = ("main.rank0", "bootstrap", SENDER, DECODE)
    kind = PrefillScheduler

    def __init__(self, directory: Path, shared: bool = False, **settings: Any) -> None:
        self.shared = shared
        settings = {"shared_kv": shared, "prefix_cache": not shared, "speculation": "off"} | settings
        if shared:
            settings["arena_pages"] = 200
        super().__init__(directory, role="prefill", transfer=SENDER, **settings)

    def attached(self) -> Attached:
        return Attached(200 if self.shared else NUM_PAGES, PAGE_SIZE, 4, 100, 100, "fingerprint")

    def before_setup(self) -> None:
        self.send(SENDER, Withdrawn())

    def offers(self) -> list[tuple[int, int]]:
        """First page and number of pages of each offer."""
        return [(m.first, len(m.pages) // 4) for m in self.received[SENDER] if isinstance(m, Offer)]


def wanted(transfer: str = "t", tokens: int = 10, held: int = 0, pages: list[int] | None = None) -> Prefill:
    return Prefill(
        transfer,
        "d.kv_receiver",
        np.arange(tokens, dtype=np.int32).tobytes(),
        tokens,
        SamplingParams(max_tokens=5, seed=1),
        held,
        np.array(pages or [], np.int32).tobytes(),
    )


def foreign(message: Prefill) -> Prefill:
    return msgspec.structs.replace(message, tokens=message.tokens[:-4] + np.int32(100).tobytes(), pages=bytes(12))


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[PrefillStage]:
    made = PrefillStage(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


@pytest.mark.parametrize("stage", [{"chunk_tokens": 5}], indirect=True)
def test_pages_are_offered_as_they_are_finished_and_held_until_released(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted())
    stage.answer(stage.expect("main.rank0", Step))
    stage.expect(SENDER, Offer)
    assert stage.offers() == [(0, 1)], "one page of four is full"
    stage.answer(stage.expect("main.rank0", Step, skip=1), token=7)
    assert stage.expect(DECODE, Prefilled) == Prefilled("t", 7, 0, None, None)
    stage.until(lambda: stage.offers() == [(0, 1), (1, 2)])
    assert len(stage.steps()) == 2, "nothing is decoded here"
    held = 3  # pages, the last one filled in part
    assert stage.scheduler.pool.available == NUM_PAGES - held
    stage.send(DECODE, Release("t"))
    assert stage.expect(DECODE, Released).transfer == "t"
    assert stage.scheduler.pool.available == NUM_PAGES
    stage.until(lambda: Withdraw(["t"]) in stage.received[SENDER])


def test_held_pages_are_not_offered_and_cached_ones_not_computed(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted("t"))
    stage.answer(stage.expect("main.rank0", Step))
    stage.expect(DECODE, Prefilled)
    stage.send(DECODE, Release("t"))
    stage.expect(DECODE, Released)
    stage.until(lambda: Withdraw(["t"]) in stage.received[SENDER])
    stage.received[SENDER].clear()
    stage.send(DECODE, wanted("u", tokens=12, held=4))
    step: Step = stage.expect("main.rank0", Step, skip=1)
    assert np.frombuffer(step.starts, np.int32).tolist() == [8]
    stage.answer(step)
    assert stage.expect(DECODE, Prefilled, skip=1).cached_tokens == 8
    stage.until(lambda: sum(count for _, count in stage.offers()) == 2)
    assert stage.offers()[0][0] == 1


def test_a_repeated_question_is_answered_again(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted())
    stage.answer(stage.expect("main.rank0", Step))
    stage.expect(DECODE, Prefilled)
    stage.send(DECODE, wanted())
    assert stage.expect(DECODE, Prefilled, skip=1).transfer == "t"
    assert stage.offers() == [(0, 3), (0, 3)]
    assert len(stage.steps()) == 1


def test_a_restarted_sender_is_offered_everything_again(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted())
    stage.answer(stage.expect("main.rank0", Step))
    stage.until(lambda: stage.offers() == [(0, 3)])
    stage.restart(SENDER)
    stage.send(SENDER, Hello())
    stage.until(lambda: stage.offers() == [(0, 3), (0, 3)])


@pytest.mark.parametrize("stage", [{"shared": True}], indirect=True)
def test_lent_pages_are_written_from_the_first_one_that_is_missing(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted(held=4, pages=[150, 151, 152]))
    step: Step = stage.expect("main.rank0", Step)
    triples = np.frombuffer(step.pages, np.int32).reshape(-1, 3)
    assert triples[:, 1:].tolist() == [[0, 150], [1, 151], [2, 152]]
    assert np.frombuffer(step.starts, np.int32).tolist() == [4]
    stage.answer(step)
    assert stage.expect(DECODE, Prefilled).cached_tokens == 4
    offer: Offer = stage.expect(SENDER, Offer)
    assert (offer.first, np.frombuffer(offer.pages, np.int32).tolist()) == (1, [151, 152])


@pytest.mark.parametrize("stage", [{"shared": True}, {"shared": False}], indirect=True, ids=["shared", "copied"])
def test_a_release_waits_for_the_step_under_way(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted(pages=[1, 2, 3] if stage.shared else None))
    step: Step = stage.expect("main.rank0", Step)
    stage.send(DECODE, Release("t"))
    stage.until(lambda: not stage.scheduler.jobs)
    stage.send(DECODE, Release("of a former incarnation"))
    stage.until(lambda: len(stage.scheduler.asked) == 2)
    assert not [m for m in stage.received[DECODE] if isinstance(m, Released)]
    stage.answer(step)
    assert {stage.expect(DECODE, Released, skip=n).transfer for n in (0, 1)} == {"t", "of a former incarnation"}


def test_a_restarted_decode_scheduler_wants_nothing_any_more(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted())
    stage.answer(stage.expect("main.rank0", Step))
    stage.expect(DECODE, Prefilled)
    stage.restart(DECODE)
    stage.send(DECODE, Hello())
    stage.until(lambda: not stage.scheduler.jobs)
    assert stage.scheduler.pool.available == NUM_PAGES


def test_what_nobody_asks_for_is_dropped_once_it_is_withdrawn(
    stage: PrefillStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.send(DECODE, wanted())
    stage.answer(stage.expect("main.rank0", Step))
    stage.expect(DECODE, Prefilled)
    monkeypatch.setattr(prefill, "SILENCE_S", 0.0)
    stage.until(lambda: Withdraw(["t"]) in stage.received[SENDER])
    assert stage.scheduler.pool.available == NUM_PAGES - 3
    stage.send(SENDER, Withdrawn(["t"]))
    stage.until(lambda: stage.scheduler.pool.available == NUM_PAGES)
    stage.send(DECODE, wanted())
    assert stage.expect(DECODE, Released).transfer == "t", "what was offered under this name is void"


def test_a_sequence_that_is_too_long_is_refused(stage: PrefillStage) -> None:
    stage.send(DECODE, wanted(tokens=101))
    refused: PrefillRefused = stage.expect(DECODE, PrefillRefused)
    assert (refused.transfer, refused.status) == ("t", 400)


@pytest.mark.parametrize(
    "message",
    [wanted(held=3), wanted(held=12), wanted(tokens=0), wanted(pages=[1]), foreign(wanted())],
    ids=["held is no page", "nothing to compute", "no tokens", "too few pages", "a token that the model has not"],
)
@pytest.mark.parametrize("stage", [{"shared": True}], indirect=True)
def test_nonsense_is_refused(stage: PrefillStage, message: Prefill) -> None:
    """Who asks would ask for ever."""
    message.prompt_len = max(1, message.prompt_len)
    stage.send(DECODE, message)
    refused: PrefillRefused = stage.expect(DECODE, PrefillRefused)
    assert refused.transfer == "t"
    assert not stage.scheduler.jobs


def test_a_restarted_scheduler_waits_until_its_former_offers_are_void(
    stage: PrefillStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.scheduler.mailbox.close()
    monkeypatch.setattr(stage, "before_setup", lambda: None)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(stage.start, 2)
        sender, asked = stage.mailboxes[SENDER], []
        while not asked:
            assert not starting.done()
            assert sender.poll(10), "nothing is asked"
            asked = [envelope.body for envelope in sender.receive() if isinstance(envelope.body, Withdraw)]
        assert asked[0] == Withdraw([])
        assert not starting.done()
        stage.send(SENDER, Withdrawn())
        stage.scheduler = starting.result(10)


def test_what_arrives_before_the_ranks_are_known_waits(stage: PrefillStage) -> None:
    scheduler = stage.scheduler
    scheduler.attached = scheduler.vocab_size = None
    stage.send(DECODE, wanted("good"))
    stage.send(DECODE, foreign(wanted("bad")))
    stage.until(lambda: len(scheduler.requests) == 2)
    assert not [m for m in stage.received[DECODE] if isinstance(m, PrefillRefused)]
    stage.send("main.rank0", stage.attached())
    assert stage.expect(DECODE, PrefillRefused).transfer == "bad"
    stage.answer(stage.expect("main.rank0", Step))
    assert stage.expect(DECODE, Prefilled).transfer == "good"
