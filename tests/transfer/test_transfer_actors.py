"""KV sender and KV receiver: offered pages arrive, and whatever is lost, withdrawn or restarted, no wrong ones do."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transfer_stage import DEADLINE_S, NUM_PAGES, RECEIVER, SENDER, D, HeldEngine, P, Stage, packed

from llm_runtime.actors.messages import (
    CancelReceive,
    Confirm,
    Confirmed,
    Message,
    Offer,
    Offered,
    Receive,
    ReceiveCancelled,
    Received,
    ReceiveFailed,
    Withdraw,
    Withdrawn,
)

NewStage = Callable[..., Stage]


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """What stages have mapped is theirs until they are collected, being parts of cycles."""
    yield
    gc.collect()


@pytest.fixture
def new_stage(tmp_path: Path) -> Iterator[NewStage]:
    made: list[Stage] = []

    def make(*args: Any, **settings: Any) -> Stage:
        made.append(Stage(tmp_path, *args, **settings))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def stage(new_stage: NewStage) -> Stage:
    return new_stage()


def hold(stage: Stage) -> HeldEngine:
    """From now on reads of the receiver wait for the test."""
    engine = HeldEngine(stage.receiver.engine)
    stage.receiver.engine = engine  # type: ignore[assignment]
    return engine


def lose_first(stage: Stage, kind: type, count: int = 1) -> list[Message]:
    """The first messages of a type are lost; those that were."""
    lost: list[Message] = []

    def decide(sender: str, message: Message) -> bool:
        if isinstance(message, kind) and len(lost) < count:
            lost.append(message)
            return True
        return False

    stage.lost = decide
    return lost


def arrived(stage: Stage, sources: list[int], targets: list[int]) -> bool:
    return stage.pages("prefill", 0, sources) == stage.pages("decode", 0, targets)


def of_kind(stage: Stage, scheduler: str, kind: type) -> list[Any]:
    return [message for message in stage.got[scheduler] if isinstance(message, kind)]


# -- the straight way ----------------------------------------------------------------------------------------------


def test_offered_pages_arrive_and_nothing_else_changes(stage: Stage) -> None:
    others = [page for page in range(NUM_PAGES) if page not in (9, 4, 5)]
    before = stage.pages("decode", 0, others)
    stage.receive("t", [9, 4, 5])
    stage.offer("t", [7, 1, 2])
    message = stage.expect(D, Received)
    assert message.nbytes == 3 * len(stage.pages("prefill", 0, [0])[0])
    assert arrived(stage, [7, 1, 2], [9, 4, 5])
    assert stage.pages("decode", 0, others) == before


def test_pages_come_chunk_by_chunk_out_of_order_and_repeated(stage: Stage) -> None:
    stage.receive("t", [10, 11, 12, 13])
    stage.offer("t", [6, 7], first=2)
    stage.offer("t", [6, 7], first=2)
    stage.until(lambda: not stage.receiver.reads and stage.sender.offers == 2)
    assert not of_kind(stage, D, Received)
    stage.offer("t", [0, 1], first=0)
    stage.expect(D, Received)
    assert arrived(stage, [0, 1, 6, 7], [10, 11, 12, 13])


def test_only_the_wanted_pages_are_read(stage: Stage) -> None:
    before = stage.pages("decode", 0, [0, 1])
    stage.receive("t", [20, 21], first=2)
    stage.offer("t", [0, 1, 2, 3, 4])
    stage.expect(D, Received)
    assert arrived(stage, [2, 3], [20, 21])
    assert stage.pages("decode", 0, [0, 1]) == before


def test_offers_that_come_before_the_scheduler_speaks_are_kept(stage: Stage) -> None:
    stage.offer("t", [3])
    stage.until(lambda: len(stage.receiver.early))
    stage.receive("t", [8])
    stage.expect(D, Received)
    assert arrived(stage, [3], [8])


def test_a_transfer_of_no_pages_is_complete(stage: Stage) -> None:
    stage.receive("t", [])
    assert stage.expect(D, Received).nbytes == 0


def test_many_transfers_at_a_time(stage: Stage) -> None:
    engine = hold(stage)
    for number in range(NUM_PAGES):
        stage.receive(f"t{number}", [number])
        stage.offer(f"t{number}", [NUM_PAGES - 1 - number])
    stage.until(lambda: len(engine.waiting) == 4)
    engine.held = False
    stage.until(lambda: len(of_kind(stage, D, Received)) == NUM_PAGES)
    assert arrived(stage, list(range(NUM_PAGES))[::-1], list(range(NUM_PAGES)))


def test_a_repeated_receive_of_a_complete_transfer_is_answered_again(stage: Stage) -> None:
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.expect(D, Received)
    stage.receive("t", [8])
    stage.expect(D, Received, skip=1)
    assert stage.receiver.received == 1


@pytest.mark.parametrize("kind", ["shared", "fake"])
def test_engines_that_move_nothing_write_nothing(new_stage: NewStage, kind: str) -> None:
    stage = new_stage(kind)
    before = stage.pages("decode", 0, range(NUM_PAGES))
    stage.receive("t", [3, 4])
    stage.offer("t", [3, 4])
    assert stage.expect(D, Received).nbytes == 0
    assert stage.pages("decode", 0, range(NUM_PAGES)) == before


def test_shared_pages_need_no_confirmation(new_stage: NewStage) -> None:
    stage = new_stage("shared")
    stage.lost = lambda sender, message: isinstance(message, Confirm | Confirmed)
    stage.receive("t", [3, 4, 5], first=1)
    stage.offer("t", [2, 3, 4])
    stage.offer("t", [5], first=3)
    stage.expect(D, Received)


def test_shared_pages_that_are_not_the_wanted_ones_fail(new_stage: NewStage) -> None:
    stage = new_stage("shared")
    stage.receive("t", [3])
    stage.offer("t", [4])
    assert "page 4" in stage.expect(D, ReceiveFailed).reason


# -- loss ----------------------------------------------------------------------------------------------------------


def test_lost_offers_come_with_the_next_ones(stage: Stage) -> None:
    lost = lose_first(stage, Offered)
    stage.receive("t", [8, 9])
    stage.offer("t", [3, 4])
    stage.until(lambda: lost)
    stage.offer("t", [3, 4])
    stage.expect(D, Received)
    assert arrived(stage, [3, 4], [8, 9])


@pytest.mark.parametrize("kind", [Confirm, Confirmed])
def test_a_lost_confirmation_is_asked_for_again(stage: Stage, kind: type) -> None:
    lost = lose_first(stage, kind)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.expect(D, Received)
    assert len(lost) == 1
    assert arrived(stage, [3], [8])


def test_a_lost_report_is_repeated_when_the_scheduler_asks(stage: Stage) -> None:
    lost = lose_first(stage, Received)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: lost)
    stage.receive("t", [8])
    stage.expect(D, Received)


# -- withdrawal ----------------------------------------------------------------------------------------------------


def test_pages_withdrawn_before_they_are_confirmed_are_read_anew(stage: Stage) -> None:
    """The pages of an aborted prefill are read while somebody else writes into them already."""
    engine = hold(stage)
    stage.receive("t", [8, 9])
    stage.offer("t", [3, 4])
    stage.until(lambda: engine.waiting)
    stage.tell(P, Withdraw(["t"]))
    assert stage.expect(P, Withdrawn).transfers == ["t"]
    engine.held = False
    stage.until(lambda: stage.receiver.refused == 1)
    assert not of_kind(stage, D, Received)
    stage.offer("t", [5, 6])
    stage.expect(D, Received)
    assert arrived(stage, [5, 6], [8, 9])


def test_pages_read_in_two_epochs_are_not_taken_for_whole(stage: Stage) -> None:
    """Half was read before a withdrawal: it has to be read again, though the new offer says the same page numbers."""
    stage.receive("t", [8, 9])
    stage.offer("t", [3], first=0)
    stage.until(lambda: "t" in stage.receiver.transfers and stage.receiver.transfers["t"].nbytes)
    stage.tell(P, Withdraw())
    stage.expect(P, Withdrawn)
    prefill = stage.arenas["prefill.rank0.kv"].buffer
    prefill[:] = bytes(255 - byte for byte in prefill)
    stage.offer("t", [4], first=1)
    stage.settle()
    assert not of_kind(stage, D, Received)
    stage.offer("t", [3], first=0)
    stage.expect(D, Received)
    assert arrived(stage, [3, 4], [8, 9])


def test_a_confirmation_of_an_earlier_epoch_counts_for_nothing(stage: Stage) -> None:
    """The sender's answer is late: the pages have been withdrawn and offered again since it was asked."""
    asked: list[Confirm] = []

    def keep(sender: str, message: Message) -> bool:
        if isinstance(message, Confirm):
            asked.append(message)
        return isinstance(message, Confirm)

    stage.lost = keep
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: asked)
    stage.lost = lambda sender, message: isinstance(message, Offered)  # the receiver does not hear of the change
    stage.tell(P, Withdraw(["t"]))
    stage.offer("t", [5])
    stage.settle()
    stage.lost = lambda sender, message: False
    stage.receiver.send(SENDER, asked[0])
    stage.until(lambda: stage.sender.refused == 1)
    stage.offer("t", [5])
    stage.expect(D, Received)
    assert arrived(stage, [5], [8])


def test_pages_offered_from_elsewhere_without_a_withdrawal_are_read_anew(stage: Stage) -> None:
    lose_first(stage, Confirm)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: "t" in stage.receiver.transfers and stage.receiver.transfers["t"].asked)
    stage.offer("t", [5])
    stage.expect(D, Received)
    assert arrived(stage, [5], [8])


def test_a_page_is_not_read_anew_while_an_older_read_may_still_write_into_it(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: engine.waiting)
    stage.tell(P, Withdraw(["t"]))
    stage.offer("t", [5])
    stage.until(lambda: stage.receiver.transfers["t"].offered == {0: 5})
    stage.settle()
    assert engine.cancelled == [1]
    assert len(engine.waiting) == 1
    engine.held = False
    stage.expect(D, Received)
    assert arrived(stage, [5], [8])


def test_a_transfer_that_is_withdrawn_again_and_again_fails(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8])
    for refused in range(6):
        stage.offer("t", [3])
        stage.until(lambda: engine.waiting)
        stage.tell(P, Withdraw())
        stage.expect(P, Withdrawn, skip=refused)
        engine.let_go()
        stage.until(lambda: stage.receiver.refused == refused + 1)  # noqa: B023
    assert "withdrawn" in stage.expect(D, ReceiveFailed).reason
    stage.receive("t", [8])
    stage.expect(D, ReceiveFailed, skip=1)


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_failed_read_is_tried_again(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8, 9])
    stage.offer("t", [3, 4])
    stage.until(lambda: engine.waiting)
    engine.fail("the peer is gone")
    stage.until(lambda: stage.receiver.reads_failed == 1 and engine.waiting)
    engine.held = False
    stage.expect(D, Received)
    assert arrived(stage, [3, 4], [8, 9])


def test_a_failed_read_is_tried_again_at_once_when_the_pages_are_offered_again(
    new_stage: NewStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor._TICK_S", 2 * DEADLINE_S)
    stage = new_stage()
    engine = hold(stage)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: engine.waiting)
    engine.fail("the peer is gone")
    stage.until(lambda: stage.receiver.reads_failed == 1)
    stage.offer("t", [3])
    stage.until(lambda: engine.waiting)
    engine.held = False
    stage.expect(D, Received)
    assert arrived(stage, [3], [8])


def test_a_transfer_whose_reads_fail_again_and_again_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor.RETRY_S", 0.001)
    engine = hold(stage)
    stage.receive("t", [8])
    stage.offer("t", [3])
    for _ in range(6):
        stage.until(lambda: engine.waiting)
        engine.fail("the peer is gone")
    assert stage.expect(D, ReceiveFailed).reason == "the peer is gone"
    assert not stage.receiver.transfers


def test_memory_that_is_not_mapped_here_is_named(new_stage: NewStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor.RETRY_S", 0.001)
    stage = new_stage()
    stage.restart(RECEIVER, sources=[])
    stage.receive("t", [8])
    stage.offer("t", [3])
    assert "prefill.rank0.kv" in stage.expect(D, ReceiveFailed).reason


def test_other_pages_are_refused_with_the_reason(new_stage: NewStage) -> None:
    stage = new_stage()
    other = [{**rank, "format": {**rank["format"], "page_size": 2}} for rank in stage.theirs]
    stage.restart(SENDER, ranks=other)
    stage.receive("t", [8])
    stage.until(lambda: "t" in stage.receiver.transfers)  # the offer is not said again here
    stage.offer("t", [3])
    assert "page size" in stage.expect(D, ReceiveFailed).reason


def test_another_transfer_engine_is_refused_with_the_reason(stage: Stage) -> None:
    stage.restart(SENDER, transfer={"kind": "fake"})
    stage.receive("t", [8])
    stage.until(lambda: "t" in stage.receiver.transfers)  # the offer is not said again here
    stage.offer("t", [3])
    assert stage.expect(D, ReceiveFailed).reason == (
        "the sender transfers with fake and the receiver with shm: set both to the same"
    )


def test_nonsense_is_dropped(stage: Stage) -> None:
    stage.offer("t", [NUM_PAGES])
    stage.offer("t", [0], first=NUM_PAGES)
    stage.tell(P, Offer("t", RECEIVER, 0, b"123"))
    stage.until(lambda: stage.sender.bad_messages == 3)
    stage.receive("t", [-1])
    stage.receive("t", [1, 1])
    stage.tell(D, Receive("t", SENDER, 0, b"123"))
    stage.tell(P, Confirm("t", (1, 0)))  # only answered
    stage.sender.send(RECEIVER, Offered("t", 0, packed([0]), b"nonsense"))
    stage.sender.send(RECEIVER, Receive("t", SENDER, 0, packed([0])))
    stage.until(lambda: stage.receiver.bad_messages == 5)
    stage.expect(P, Confirmed)
    assert stage.expect(D, ReceiveFailed).transfer == "t"
    assert not stage.receiver.transfers
    assert not stage.sender.transfers


# -- cancellation --------------------------------------------------------------------------------------------------


def test_a_cancellation_while_reading_is_answered_when_nothing_is_written_any_more(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: engine.waiting)
    stage.tell(D, CancelReceive("t"))
    stage.until(lambda: engine.cancelled)
    stage.settle()
    answers = [m for m in of_kind(stage, D, ReceiveCancelled) if m.transfer == "t"]
    assert not answers, "a read is under way"
    engine.held = False
    stage.until(lambda: [m for m in of_kind(stage, D, ReceiveCancelled) if m.transfer == "t"])
    assert not of_kind(stage, D, Received)
    assert not stage.receiver.transfers


def test_cancelling_what_is_unknown_or_complete_is_answered(stage: Stage) -> None:
    stage.tell(D, CancelReceive("never"))
    assert stage.expect(D, ReceiveCancelled).transfer == "never"
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.expect(D, Received)
    stage.tell(D, CancelReceive("t"))
    assert stage.expect(D, ReceiveCancelled, skip=1).transfer == "t"
    assert not stage.receiver.finished


# -- restarts ------------------------------------------------------------------------------------------------------


def test_a_restarted_sender_confirms_nothing_of_before(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8, 9])
    stage.offer("t", [3, 4])
    stage.until(lambda: engine.waiting)
    stage.restart(SENDER)
    engine.held = False
    stage.until(lambda: not stage.receiver.reads)
    stage.settle()
    assert not of_kind(stage, D, Received)
    stage.offer("t", [5, 6])  # as the scheduler does when it sees the new sender
    stage.expect(D, Received)
    assert arrived(stage, [5, 6], [8, 9])


def test_a_restarted_receiver_gets_the_offers_again(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8, 9, 10])
    stage.offer("t", [3, 4])
    stage.offer("t", [5], first=2)
    stage.until(lambda: engine.waiting)
    stage.restart(RECEIVER)
    stage.receive("t", [8, 9, 10])  # the decode scheduler's repetition
    stage.expect(D, Received)
    assert arrived(stage, [3, 4, 5], [8, 9, 10])


def test_a_restarted_prefill_scheduler_takes_its_offers_back(stage: Stage) -> None:
    engine = hold(stage)
    stage.receive("t", [8])
    stage.offer("t", [3])
    stage.until(lambda: engine.waiting)
    stage.restart_scheduler(P)
    stage.tell(P, Withdraw())
    stage.expect(P, Withdrawn)
    engine.held = False
    stage.until(lambda: stage.receiver.refused == 1)
    assert not of_kind(stage, D, Received)
    stage.offer("t", [5])
    stage.expect(D, Received)
    assert arrived(stage, [5], [8])


def test_a_restarted_prefill_schedulers_first_word_is_enough(stage: Stage) -> None:
    stage.offer("old", [3])
    stage.until(lambda: stage.sender.transfers)
    stage.restart_scheduler(P)
    stage.offer("new", [4])
    stage.until(lambda: list(stage.sender.transfers) == ["new"])


def test_a_restarted_decode_scheduler_hears_when_the_former_ones_reads_have_stopped(stage: Stage) -> None:
    """It gives away pages into which a read of its former incarnation may still write: first it has to ask."""
    engine = hold(stage)
    stage.receive("old", [8])
    stage.offer("old", [3])
    stage.until(lambda: engine.waiting)
    stage.restart_scheduler(D)
    stage.tell(D, CancelReceive("new"))
    stage.receive("new", [8])
    stage.offer("new", [4])
    stage.until(lambda: "new" in stage.receiver.transfers and stage.receiver.transfers["new"].offered)
    assert engine.cancelled == [1]
    assert len(engine.waiting) == 1, "the new transfer's page is still the old one's"
    assert not of_kind(stage, D, ReceiveCancelled)
    engine.held = False
    assert stage.expect(D, ReceiveCancelled).transfer == "new"
    assert stage.expect(D, Received).transfer == "new"
    assert arrived(stage, [4], [8])


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_lost_and_restarted_no_mixture_arrives(
    new_stage: NewStage, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Messages are lost, both actors and the prefill scheduler are restarted, pages are taken back, overwritten and
    offered from elsewhere: what is reported as received is what was offered at one time."""
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor.CONFIRM_INTERVAL_S", 0.02)
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor._TICK_S", 0.01)
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor.MAX_FAILURES", 10_000)
    draw = random.Random(seed)
    stage = new_stage()
    stage.lost = lambda sender, message: draw.random() < 0.2
    size = len(stage.pages("prefill", 0, [0])[0])
    arena = stage.arenas["prefill.rank0.kv"].buffer
    targets = {f"t{number}": list(range(4 * number, 4 * number + 4)) for number in range(6)}
    offered: dict[str, list[int]] = {}
    contents: dict[str, list[list[bytes]]] = {name: [] for name in targets}
    withdrawing, withdrawals = False, 0
    calm_until, restarts = 0.0, 0

    def compute() -> None:
        """The prefill engine fills pages anew, for all transfers."""
        places = draw.sample(range(NUM_PAGES), NUM_PAGES)
        arena[:] = draw.randbytes(len(arena))
        for name in targets:
            offered[name], places = places[:4], places[4:]
            contents[name].append([bytes(arena[page * size : (page + 1) * size]) for page in offered[name]])

    def received() -> set[str]:
        return {message.transfer for message in of_kind(stage, D, Received)}

    compute()
    engine = hold(stage)
    checked: set[str] = set()
    deadline = time.monotonic() + 60
    while len(checked) < len(targets):
        assert time.monotonic() < deadline, f"only {checked} have arrived"
        for name, pages in targets.items():
            if draw.random() < 0.3:
                stage.receive(name, pages)
            if draw.random() < 0.1 and not withdrawing:
                first = draw.randrange(4)
                stage.offer(name, offered[name][first : first + 1], first)
        if (withdrawals < 30 or restarts < 30) and draw.random() < 0.1 and not withdrawing:
            withdrawing = True
            withdrawals += 1
            if draw.random() < 0.3:
                stage.restart_scheduler(P)
        if withdrawing:
            stage.tell(P, Withdraw())
        if draw.random() < 0.04 and time.monotonic() >= calm_until:
            # Peers need up to 50 ms to connect anew: on a fast machine no message would ever arrive between restarts.
            calm_until = time.monotonic() + draw.random() ** 4 * 0.2
            restarts += 1
            if draw.random() < 0.5:
                stage.restart(SENDER)
            else:
                stage.restart(RECEIVER)
                engine = hold(stage)
        if draw.random() < 0.2:
            engine.let_go()  # until then reads are delayed
        stage.until(lambda: True)
        if withdrawing and of_kind(stage, P, Withdrawn):
            stage.got[P].clear()
            stage.settle()  # of several answers, all come
            stage.got[P].clear()
            withdrawing = False
            compute()
        for name in received() - checked:
            assert stage.pages("decode", 0, targets[name]) in contents[name], name
            checked.add(name)


# -- ranks that hold different heads -------------------------------------------------------------------------------

LAYOUTS = {
    "1 to 2": ([(0, 3)], [(0, 2), (2, 3)]),
    "2 to 1": ([(0, 2), (2, 3)], [(0, 3)]),
    "2 to 2": ([(0, 2), (2, 3)], [(0, 2), (2, 3)]),
    "3 to 2": ([(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)]),
    "2 to 2, cut elsewhere": ([(0, 1), (1, 3)], [(0, 2), (2, 3)]),
    "1 to 2, the same on both": ([(0, 3)], [(0, 3), (0, 3)]),
    "2 to 1, the same on both": ([(0, 3), (0, 3)], [(0, 3)]),
}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_find_their_ranks(new_stage: NewStage, layout: str, dtype: str) -> None:
    theirs, own = LAYOUTS[layout]
    stage = new_stage(theirs=theirs, own=own, dtype=dtype)
    sources, targets = [7, 8, 1, 20, 0], [2, 3, 5, 4, 23]
    untouched = [page for page in range(NUM_PAGES) if page not in targets]
    before = [stage.pages("decode", rank, untouched) for rank in range(len(own))]
    stage.receive("t", targets)
    stage.offer("t", sources)
    stage.expect(D, Received)
    for kind in (0, 1) if dtype == "int8" else (0,):
        by_head = {}
        for rank, (first, end) in enumerate(theirs):
            for head in range(first, end):
                by_head[head] = stage.vectors("prefill", rank, sources)[kind][:, :, :, :, head - first]
        for rank, (first, end) in enumerate(own):
            found = stage.vectors("decode", rank, targets)[kind]
            for head in range(first, end):
                assert torch.equal(found[:, :, :, :, head - first], by_head[head]), (rank, head)
    assert [stage.pages("decode", rank, untouched) for rank in range(len(own))] == before


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2), (2, 3)])
def test_latents_are_copied_to_every_rank_as_they_are(new_stage: NewStage, ranks: tuple[int, int]) -> None:
    """All ranks hold the same pages of latent attention, so they come from any of the sender's."""
    stage = new_stage(theirs=[(0, 1)] * ranks[0], own=[(0, 1)] * ranks[1], pages="mla")
    stage.receive("t", [2, 3, 5])
    stage.offer("t", [7, 8, 1])
    stage.expect(D, Received)
    for rank in range(ranks[1]):
        assert stage.pages("decode", rank, [2, 3, 5]) == stage.pages("prefill", 0, [7, 8, 1])


def test_more_pages_than_the_staging_memory_holds(new_stage: NewStage) -> None:
    stage = new_stage(theirs=[(0, 3)], own=[(0, 2), (2, 3)], staging_bytes=2**16)
    route_bytes = len(stage.pages("prefill", 0, [0])[0])
    assert stage.receiver.staging.block_bytes // route_bytes < NUM_PAGES
    stage.receive("t", list(range(NUM_PAGES))[::-1])
    stage.offer("t", list(range(NUM_PAGES)))
    stage.expect(D, Received)
    theirs, _ = stage.vectors("prefill", 0, list(range(NUM_PAGES))[::-1])
    assert torch.equal(theirs[:, :, :, :, :2], stage.vectors("decode", 0, range(NUM_PAGES))[0])
    assert torch.equal(theirs[:, :, :, :, 2:], stage.vectors("decode", 1, range(NUM_PAGES))[0])


def test_heads_that_no_rank_of_the_sender_holds_are_named(new_stage: NewStage) -> None:
    stage = new_stage(theirs=[(0, 2)], own=[(0, 3)])
    stage.receive("t", [8])
    stage.offer("t", [3])
    assert "heads 2 to 2" in stage.expect(D, ReceiveFailed).reason


# -- bounds --------------------------------------------------------------------------------------------------------


def test_the_sender_forgets_the_oldest_of_too_many_transfers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.actors.kv_sender.actor.MAX_TRANSFERS", 2)
    for number in range(3):
        stage.offer(f"t{number}", [number])
    stage.until(lambda: stage.sender.offers == 3)
    assert list(stage.sender.transfers) == ["t1", "t2"]


def test_early_offers_and_ends_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.early.MAX_PAGES", 4)
    monkeypatch.setattr("llm_runtime.actors.kv_receiver.actor.MAX_FINISHED", 1)
    for number in range(5):
        stage.offer(f"early{number}", [number])
    stage.until(lambda: stage.sender.offers == 5)
    stage.settle()
    assert len(stage.receiver.early) == 2
    for number in range(2):
        stage.receive(f"t{number}", [number])
        stage.offer(f"t{number}", [number])
        stage.expect(D, Received, skip=number)
    assert list(stage.receiver.finished) == ["t1"]


def test_the_figures_name_what_has_happened(stage: Stage) -> None:
    stage.receive("t", [8])
    stage.offer("t", [3])
    message = stage.expect(D, Received)
    assert structs.asdict(message)["nbytes"] == stage.receiver.stats()["kv_received_bytes"]
    assert stage.sender.stats() | {"kv_confirmed": 1.0, "kv_offers": 1.0} == stage.sender.stats()
