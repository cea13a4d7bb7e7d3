"""What no rank can compute ends, and everything beside it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stage import NUM_PAGES, Stage, generate

from llm_runtime.actors.messages import (
    SAMPLE,
    Attach,
    Generate,
    Refused,
    SamplingParams,
    Step,
    StepRefused,
    StepResult,
    TextParams,
    Thinking,
)

RIDS = [f"r{number}" for number in range(4)]


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


def compute(stage: Stage, guilty: str, named: bool, malformed: bool = False) -> int:
    """Answers steps as a rank does that refuses those with rows of `guilty` behind its prompt, and says which slot it
    means if `named`, or else answers them with nonsense if `malformed`. How many were refused."""
    refused = 0
    handled = 0

    def idle() -> bool:
        nonlocal refused, handled
        got = stage.received["main.rank0"]
        for message in got[handled:]:
            handled += 1
            if isinstance(message, Attach):
                stage.send("main.rank0", stage.attached())
            if not isinstance(message, Step):
                continue
            request = stage.scheduler.requests.get(guilty)
            slot = request.block_table.slot if request and request.block_table else None
            slots, starts = np.frombuffer(message.slots, np.int32), np.frombuffer(message.starts, np.int32)
            if not any(s == slot and at >= 4 for s, at in zip(slots.tolist(), starts.tolist(), strict=True)):
                stage.answer(message)
                continue
            refused += 1
            assert refused < 20
            drawn = sum(1 for flags in message.flags if flags & SAMPLE)
            if malformed:
                stage.send("main.rank0", StepResult(message.number, b"\0\0\0\0" * (drawn + 1)))
            else:
                stage.send(
                    "main.rank0", StepRefused(message.number, [slot] if named and slot is not None else [], "No.")
                )
        return not stage.scheduler.batch.running and not stage.scheduler.batch.waiting

    stage.received["main.rank0"] = [m for m in stage.received["main.rank0"] if not isinstance(m, Attach)]
    for rid in RIDS:
        stage.send("ingress0", generate(rid, prompt=3, max_tokens=5))
    stage.until(lambda: len(stage.scheduler.requests) == len(RIDS))
    stage.until(idle)
    return refused


@pytest.mark.parametrize(("named", "malformed"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("guilty", RIDS)
@pytest.mark.parametrize("stage", [{}, {"run_ahead": False}], indirect=True, ids=["ahead", "one by one"])
def test_a_refused_step_ends_the_request_that_it_is_about(
    stage: Stage, guilty: str, named: bool, malformed: bool
) -> None:
    refusals = compute(stage, guilty, named, malformed)
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.status) == (guilty, 500)
    assert "cannot compute this request" in refused.message
    stage.until(lambda: sum(event.finish is not None for event in stage.events()) == len(RIDS) - 1)
    finished = [event.rid for event in stage.events() if event.finish == "length"]
    assert sorted(finished) == sorted(set(RIDS) - {guilty})
    assert refusals <= (2 if named else 5)
    assert stage.scheduler.pool.available == NUM_PAGES


def packed(*tokens: int) -> bytes:
    return np.array(tokens, "<i4").tobytes()


PLAIN = SamplingParams(max_tokens=3, seed=1)
BIASED = SamplingParams(max_tokens=3, seed=1, logit_bias={100: 1.0})
FORCED = SamplingParams(max_tokens=3, seed=1, thinking=Thinking(["</think>"], budget=1, closing=[5, 100]))


@pytest.mark.parametrize(
    "message",
    [
        Generate("r", 0, packed(1, 100, 2), PLAIN, TextParams()),
        Generate("r", 0, packed(1, -1, 2), PLAIN, TextParams()),
        Generate("r", 1, packed(1, 2), PLAIN, TextParams(), packed(100)),
        Generate("r", 0, packed(1, 2), BIASED, TextParams()),
        Generate("r", 0, packed(1, 2), FORCED, TextParams()),
        Generate("r", 0, b"", PLAIN, TextParams()),
        Generate("r", 0, b"123", PLAIN, TextParams()),
        Generate("r", 0, packed(1), PLAIN, TextParams(), b"123"),
    ],
    ids=["prompt", "negative", "output", "bias", "forced", "empty", "torn", "torn output"],
)
def test_tokens_that_the_model_does_not_have_are_refused(stage: Stage, message: Generate) -> None:
    stage.send("ingress0", message)
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.attempt, refused.status) == (message.rid, message.attempt, 400)
    assert not stage.scheduler.requests
    assert not stage.steps()


def test_what_ranks_are_told_of_new_requests_is_spread_over_steps(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of all of them would be larger than a message may be; also when the ranks have been restarted."""
    monkeypatch.setattr("llm_runtime.actors.scheduler.batch.OPENING_BYTES", 12 * 25)
    sampling = SamplingParams(max_tokens=12, seed=1, logit_bias=dict.fromkeys(range(10), 1.0))
    for rid in RIDS:
        stage.send("ingress0", generate(rid, max_tokens=3, sampling=sampling))
    stage.until(lambda: len(stage.scheduler.requests) == len(RIDS))
    stage.until(lambda: answered_all(stage, 2))
    stage.received["main.rank0"].clear()
    stage.send("main.rank0", stage.attached())
    stage.until(lambda: stage.steps())
    stage.generate_all()
    opened = [len(step.new_requests) for step in stage.steps()]
    assert max(opened) <= 2
    assert sum(opened) >= len(RIDS)
    assert sorted(event.rid for event in stage.events() if event.finish) == RIDS


def answered_all(stage: Stage, rows: int) -> bool:
    """Answers steps until so many requests are in one; that one stays open."""
    if not stage.scheduler.in_flight:
        return False
    step = stage.scheduler.in_flight[0]
    if len(step.rows) > rows:
        return True
    stage.answer(next(each for each in stage.steps() if each.number == step.number))
    return False


def test_what_arrives_before_the_ranks_are_known_waits(stage: Stage) -> None:
    """A restarted scheduler finds requests in its inbox before the ranks have said which tokens there are."""
    scheduler = stage.scheduler
    scheduler.attached = scheduler.vocab_size = None
    bad = np.array([1, 100, 2], "<i4").tobytes()  # one beyond the vocabulary
    stage.send("ingress0", generate("good", prompt=3))
    stage.send("ingress0", Generate("bad", 0, bad, SamplingParams(max_tokens=3, seed=1), TextParams()))
    stage.until(lambda: len(scheduler.requests) == 2)
    assert not [m for m in stage.received["ingress0"] if isinstance(m, Refused)]
    stage.send("main.rank0", stage.attached())
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.status) == ("bad", 400)
    assert "token 100; the model has the tokens 0 to 99" in refused.message
    stage.generate_all()
    assert [event.rid for event in stage.events() if event.finish is not None] == ["good"]
