"""The scheduler among its peers: real sockets, the test in the place of ingress, ranks, detokenizer and bootstrap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec import structs
from stage import NUM_PAGES, Stage, generate

from llm_runtime.actors.messages import (
    SAMPLE,
    Abort,
    Acknowledge,
    Attach,
    CacheFlushed,
    FlushCache,
    Hello,
    Refused,
    Register,
    Resend,
    SamplingParams,
    Step,
    StepResult,
    Stopped,
    TextParams,
    Tokens,
    TopLogprobs,
    Unknown,
)
from llm_runtime.actors.scheduler.actor import GROUP_STEPS


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path, **getattr(request, "param", {}))
    yield made
    made.close()


def test_a_request_becomes_steps_and_tokens_and_is_kept_until_acknowledged(stage: Stage) -> None:
    stage.send("ingress0", generate())
    first = stage.expect("main.rank0", Step)
    assert [opening.slot for opening in first.new_requests] == np.frombuffer(first.slots, np.int32).tolist()
    second = stage.expect("main.rank0", Step, skip=1)
    assert np.frombuffer(second.tokens, np.int32).tolist() == [-1], "run ahead: the token is not known yet"
    assert not second.new_requests
    stage.generate_all()
    assert [(e.index, e.tokens, e.finish) for e in stage.events()] == [
        (0, [5], None),
        (1, [5], None),
        (2, [5], "length"),
    ]
    assert "r" in stage.scheduler.requests
    stage.send("ingress0", Acknowledge(["r"]))
    stage.until(lambda: "r" not in stage.scheduler.requests)
    stage.until(lambda: any(m.closes == ["r"] for m in stage.received["detokenizer"] if isinstance(m, Tokens)))


def test_tokens_of_an_answer_that_is_not_streamed_go_on_in_groups(stage: Stage) -> None:
    def arrived(rid: str) -> list[tuple[int, int, str | None]]:
        return [(event.index, len(event.tokens), event.finish) for event in stage.events() if event.rid == rid]

    stage.send("ingress0", generate("whole", max_tokens=60, whole=True))
    stage.send("ingress0", generate("stop", max_tokens=60, whole=True, text=TextParams(stop=["x"])))
    stage.until(lambda: len(stage.scheduler.requests) == 2)
    stage.generate_all()
    (first, *groups) = arrived("whole")
    assert first == (0, 1, None), "the time to the first token is measured by it"
    assert 1 < max(size for _, size, _ in groups) < 2 * GROUP_STEPS, "answers lag behind the steps that are counted"
    assert len(groups) < 30, "they also go on once a second"
    assert [index for index, _, _ in groups] == list(np.cumsum([1, *(size for _, size, _ in groups[:-1])]))
    assert sum(size for _, size, _ in groups) == 59
    assert groups[-1][2] == "length"
    assert [size for _, size, _ in arrived("stop")] == [1] * 60, "a stop string must not be found too late"


def test_tokens_kept_for_a_group_are_sent_when_they_are_asked_for(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=60, whole=True))
    for skip in range(4):
        stage.answer(stage.expect("main.rank0", Step, skip=skip))
    stage.until(lambda: len(stage.scheduler.requests["r"].kept) == 3)
    stage.send("ingress0", Resend("r", 0))
    stage.until(lambda: len(stage.events()) >= 4)
    assert [(event.index, event.tokens) for event in stage.events()][-2:] == [(0, [5]), (1, [5, 5, 5])]
    stage.send("ingress0", Abort("r"))
    stage.until(lambda: not stage.scheduler.requests)
    assert not any(request.kept for request in stage.scheduler.requests.values())


def test_a_flushed_cache_is_empty_and_stays_so(stage: Stage) -> None:
    def answers() -> list[CacheFlushed]:
        return [message for message in stage.received["ingress0"] if isinstance(message, CacheFlushed)]

    stage.send("ingress0", generate("a", prompt=12, max_tokens=50))
    stage.expect("main.rank0", Step)
    stage.send("ingress0", FlushCache("f"))
    (refused,) = stage.until(answers)
    assert "1 requests in progress" in refused.refusal
    stage.send("ingress0", Abort("a"))
    stage.generate_all()
    stage.send("ingress0", generate("b", prompt=12))
    stage.until(lambda: "b" in stage.scheduler.requests)
    stage.generate_all()
    assert stage.scheduler.pool.tree.total_pages > 0
    stage.send("ingress0", FlushCache("g"))
    assert stage.until(lambda: answers()[1:]) == [CacheFlushed("g")]
    pool = stage.scheduler.pool
    assert (pool.tree.total_pages, pool.free) == (0, NUM_PAGES)
    assert not pool.ledger.count.any(), "a restarted scheduler must not find the prefixes again"
    stage.send("ingress0", generate("c", prompt=12))
    stage.until(lambda: "c" in stage.scheduler.requests)
    stage.generate_all()
    assert stage.scheduler.requests["c"].cached_tokens == 0


def test_a_stop_token_ends_a_request_and_the_step_sent_ahead_is_ignored(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=50))
    stage.answer(stage.expect("main.rank0", Step), token=2)
    stage.answer(stage.expect("main.rank0", Step, skip=1), token=7)
    stage.until(lambda: not stage.scheduler.in_flight and stage.events())
    assert [(e.tokens, e.finish) for e in stage.events()] == [([2], "stop")]
    assert stage.scheduler.pool.available == NUM_PAGES


def test_a_restarted_rank_gets_slots_pages_and_unanswered_steps_again(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=9))
    stage.answer(stage.expect("main.rank0", Step), token=7)
    stage.expect("main.rank0", Step, skip=2)
    before = stage.steps()
    stage.restart("main.rank0")
    stage.send("main.rank0", stage.attached())
    stage.until(lambda: len(stage.steps()) >= len(before) + 2)
    again = stage.steps()[len(before) :]
    assert [step.starts for step in again] == [step.starts for step in before[1:]], "the same positions"
    assert again[0].new_requests
    assert again[0].pages
    assert np.frombuffer(again[0].tokens, np.int32).tolist() == [7], "what has been answered is sent as it is"
    assert np.frombuffer(again[1].tokens, np.int32).tolist() == [-1]


@pytest.mark.parametrize("stage", [{"max_model_len": 120, "chunk_tokens": 100}], indirect=True)
def test_steps_are_short_after_the_ranks_died_until_some_are_answered(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks die more often than a long prefill takes, it would never be answered."""
    monkeypatch.setattr("llm_runtime.actors.scheduler.engine.SLOW_START_TOKENS", 10)
    stage.send("ingress0", generate(prompt=100, max_tokens=1))
    assert len(stage.expect("main.rank0", Step).tokens) == 4 * 100
    stage.received["main.rank0"].clear()
    stage.restart("main.rank0")
    stage.send("main.rank0", Hello())
    stage.expect("main.rank0", Attach)
    stage.send("main.rank0", stage.attached())
    stage.generate_all()
    sizes = [len(step.tokens) // 4 for step in stage.steps()]
    assert sizes[:2] == [10, 10]
    assert max(sizes) > 10
    assert sum(sizes) == 100


def test_when_the_kv_pages_are_lost_everything_is_computed_again(stage: Stage) -> None:
    stage.send("ingress0", generate(prompt=12, max_tokens=9))
    stage.answer(stage.expect("main.rank0", Step), token=7)
    stage.expect("main.rank0", Step, skip=2)
    before = len(stage.steps())
    stage.restart("main.rank0")
    stage.send("main.rank0", structs.replace(stage.attached(), kv_epoch=2))
    again = stage.until(lambda: stage.steps()[before:])[0]
    assert np.frombuffer(again.starts, np.int32).tolist() == [0]
    assert np.frombuffer(again.tokens, np.int32).tolist() == [*range(12), 7]
    stage.generate_all()
    assert [(e.index, e.tokens) for e in stage.events()][:2] == [(0, [7]), (1, [5])]
    assert stage.events()[-1].finish == "length"


def test_a_lost_answer_makes_the_ranks_attach_again(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=9))
    second = stage.expect("main.rank0", Step, skip=1)
    attaches = sum(isinstance(m, Attach) for m in stage.received["main.rank0"])
    stage.answer(second)
    stage.until(lambda: sum(isinstance(m, Attach) for m in stage.received["main.rank0"]) > attaches)
    stage.send("main.rank0", stage.attached())
    assert [step.number for step in stage.until(lambda: len(stage.steps()) >= 4 and stage.steps()[2:])] == [1, 2]


def test_a_repeated_answer_does_not_count_for_the_next_step(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=3))
    first, second = (stage.expect("main.rank0", Step, skip=number) for number in range(2))
    stage.answer(first, token=5)
    stage.until(lambda: len(stage.events()) == 1)
    stage.answer(first, token=9)  # older than the oldest step that is open
    stage.answer(second, token=6)
    stage.until(lambda: len(stage.events()) == 2)
    assert [event.tokens for event in stage.events()] == [[5], [6]]


def test_a_restarted_detokenizer_gets_every_request_from_its_beginning(stage: Stage) -> None:
    stage.send("ingress0", generate())
    stage.generate_all()
    stage.restart("detokenizer")
    stage.received["detokenizer"].clear()

    def replayed() -> bool:
        # Again and again: what is sent before the scheduler's socket notices the restart is lost.
        stage.send("detokenizer", Resend("other", 0))
        if stage.scheduler.mailbox.counters.received % 50 == 0:
            stage.send("detokenizer", Resend("r", 0))
        return len(stage.events()) >= 3

    stage.until(replayed)
    opened = [o.rid for m in stage.received["detokenizer"] if isinstance(m, Tokens) for o in m.opens]
    assert set(opened) == {"r"}
    assert [event.index for event in stage.events()][:3] == [0, 1, 2]


def test_a_restarted_ingress_loses_its_requests(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=90))
    stage.expect("main.rank0", Step)
    stage.restart("ingress0")
    stage.send("ingress0", generate("new"))
    stage.until(lambda: list(stage.scheduler.requests) == ["new"])


def test_a_newer_attempt_replaces_and_goes_on_after_its_output(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=4))
    stage.expect("main.rank0", Step)
    output = np.array([8, 9], np.int32).tobytes()
    stage.send("ingress0", generate(max_tokens=4, attempt=1, output=output, characters=5))
    stage.send("ingress0", generate(max_tokens=4))
    stage.generate_all()
    assert [(e.attempt, e.index) for e in stage.events() if e.attempt == 1] == [(1, 2), (1, 3)]
    assert stage.events()[-1].finish == "length"
    openings = [o for m in stage.received["detokenizer"] if isinstance(m, Tokens) for o in m.opens]
    assert [(o.attempt, o.base, o.characters) for o in openings] == [(0, b"", 0), (1, output, 5)]
    assert all(m.closes == [] for m in stage.received["detokenizer"] if isinstance(m, Tokens))


def test_abort_frees_pages_at_once(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=90))
    stage.expect("main.rank0", Step)
    stage.send("ingress0", Abort("r"))
    stage.until(lambda: stage.scheduler.pool.available == NUM_PAGES)
    assert not stage.scheduler.requests


def test_a_stop_string_found_by_the_detokenizer_ends_the_request(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=90))
    stage.answer(stage.expect("main.rank0", Step))
    stage.until(stage.events)
    stage.send("detokenizer", Stopped("r", 0, 0))
    stage.until(lambda: not stage.scheduler.batch.running)
    assert stage.scheduler.requests["r"].finish == "stop"


@pytest.mark.parametrize("stage", [{"max_queue": 2}], indirect=True)
def test_a_full_queue_refuses_with_429_and_never_a_repeated_request(stage: Stage) -> None:
    for number in range(6):
        stage.send("ingress0", generate(f"r{number}", prompt=40, max_tokens=20))
    stage.expect("main.rank0", Step)
    stage.send("ingress0", generate("more", prompt=40, max_tokens=20))
    refused: Refused = stage.expect("ingress0", Refused)
    assert refused.status == 429
    assert refused.retry_after_s > 0
    stage.send("ingress0", generate("again", prompt=40, max_tokens=20, attempt=1))
    stage.until(lambda: "again" in stage.scheduler.requests)


def test_what_can_never_fit_is_refused_with_400(stage: Stage) -> None:
    stage.send("ingress0", generate(prompt=90, max_tokens=11))
    refused: Refused = stage.expect("ingress0", Refused)
    assert refused.status == 400
    assert "90" in refused.message


def test_what_comes_before_the_ranks_have_told_their_vocabulary_is_looked_at_then(stage: Stage) -> None:
    """A restarted scheduler hears of its requests before it hears of its ranks."""
    scheduler = stage.scheduler
    scheduler.attached = scheduler.vocab_size = None
    stage.send("ingress0", generate("good"))
    stage.send("ingress0", msgspec.structs.replace(generate("bad"), prompt=np.array([1, 338], np.int32).tobytes()))
    stage.until(lambda: len(scheduler.requests) == 2)
    stage.send("main.rank0", stage.attached())
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.status) == ("bad", 400)
    assert "338" in refused.message
    stage.generate_all()
    assert {event.rid for event in stage.events()} == {"good"}
    stage.send("ingress0", msgspec.structs.replace(generate("late"), prompt=np.array([338], np.int32).tobytes()))
    assert stage.expect("ingress0", Refused, skip=1).rid == "late"


def test_a_request_past_its_time_is_given_up(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=90, timeout_s=0.01))
    assert stage.expect("ingress0", Refused).status == 408
    stage.until(lambda: stage.scheduler.pool.available == NUM_PAGES)


def test_resend_of_an_unknown_request_is_answered(stage: Stage) -> None:
    stage.send("ingress0", Resend("nobody", 3))
    unknown: Unknown = stage.expect("ingress0", Unknown)
    assert (unknown.rid, unknown.attempt) == ("nobody", 3)


def test_no_tokens_wanted_is_answered_without_a_step(stage: Stage) -> None:
    stage.send("ingress0", generate(max_tokens=0))
    stage.until(stage.events)
    assert [(e.tokens, e.finish) for e in stage.events()] == [([], "length")]
    assert not stage.steps()


def test_the_engine_registers_with_the_bootstrap(stage: Stage) -> None:
    register: Register = stage.expect("bootstrap", Register)
    assert register.engine.scheduler == "main.scheduler"
    assert register.engine.fingerprint == "fingerprint"
    stage.restart("bootstrap")
    stage.received["bootstrap"].clear()
    stage.expect("bootstrap", Register)


@pytest.mark.parametrize(
    "result",
    [StepResult(1, b""), StepResult(1, b"123"), StepResult(1, b"\0" * 400), StepResult(10**6, b"")],
    ids=["none", "torn", "too many", "of the future"],
)
def test_an_answer_that_does_not_fit_is_dropped(stage: Stage, result: StepResult) -> None:
    stage.send("ingress0", generate())
    first = stage.expect("main.rank0", Step)
    stage.send("main.rank0", result)
    stage.send("main.rank0", stage.attached())
    stage.answer(first)
    stage.generate_all()
    assert stage.events()[-1].finish == "length"


def test_ranks_that_were_restarted_before_they_were_heard_of_are_attached_again(stage: Stage) -> None:
    """Scheduler and ranks die together: the `Attach` of the new scheduler may have gone to the old ranks."""
    stage.scheduler.mailbox.close()
    stage.restart("main.rank0")
    stage.received["main.rank0"].clear()
    stage.send("main.rank0", Hello())
    stage.scheduler = stage.start(2)
    stage.expect("main.rank0", Attach, skip=1)


@pytest.mark.parametrize("poison", [0, 1, 2, 3])
def test_a_request_that_kills_its_rank_every_time_fails_alone(stage: Stage, poison: int) -> None:
    rids = [f"r{number}" for number in range(4)]
    for rid in rids:
        stage.send("ingress0", generate(rid, prompt=3, max_tokens=5))
    stage.until(lambda: len(stage.scheduler.requests) == 4)
    stage.received["main.rank0"] = [m for m in stage.received["main.rank0"] if not isinstance(m, Attach)]
    answered: set[int] = set()
    deaths, attached = 0, True

    def rank_lives() -> bool:
        """Answers steps, and dies of those with the poisonous request beyond its second output token. What was sent to
        a former incarnation is not run: it came before `Attach`."""
        nonlocal deaths, attached
        got = stage.received["main.rank0"]
        attaches = [at for at, message in enumerate(got) if isinstance(message, Attach)]
        if attaches:
            del got[: attaches[-1] + 1]
            attached = True
            stage.send("main.rank0", stage.attached())
        if not attached:
            return False
        for step in [step for step in stage.steps() if step.number not in answered]:
            poisoned = stage.scheduler.requests.get(rids[poison])
            slot = poisoned.block_table.slot if poisoned and poisoned.block_table else None
            slots, starts = np.frombuffer(step.slots, np.int32), np.frombuffer(step.starts, np.int32)
            if any(s == slot and at >= 5 for s, at in zip(slots.tolist(), starts.tolist(), strict=True)):
                deaths += 1
                assert deaths < 20
                attached = False
                got.clear()
                stage.restart("main.rank0")
                stage.send("main.rank0", Hello())
                return False
            answered.add(step.number)
            stage.answer(step)
        return not stage.scheduler.batch.running and not stage.scheduler.batch.waiting

    stage.until(rank_lives)
    refused: Refused = stage.expect("ingress0", Refused)
    assert (refused.rid, refused.status) == (rids[poison], 500)
    stage.until(lambda: sum(event.finish is not None for event in stage.events()) == len(rids) - 1)
    finished = [event.rid for event in stage.events() if event.finish == "length"]
    assert sorted(finished) == sorted(set(rids) - {rids[poison]})
    assert deaths == 3 + 1 + 1, "of all together, of its half, and of it alone"
    assert stage.scheduler.pool.available == NUM_PAGES


@pytest.mark.parametrize("stage", [{"chunk_tokens": 8}], indirect=True)
def test_prompt_logprobs_of_a_chunked_prompt_begin_anew_with_the_ranks(stage: Stage) -> None:
    """What a rank remembers of a chunk's last token is gone with it, so chunks that follow cannot be run."""
    stage.send("ingress0", generate(prompt=20, sampling=SamplingParams(max_tokens=2, seed=1, prompt_logprobs=0)))
    first = stage.expect("main.rank0", Step)
    second = stage.expect("main.rank0", Step, skip=1)
    assert [np.frombuffer(step.starts, np.int32).tolist() for step in (first, second)] == [[0], [8]]
    stage.send("main.rank0", StepResult(1, b"", prompt_logprobs=[TopLogprobs(0, np.zeros(8, np.float32).tobytes())]))
    stage.until(lambda: stage.scheduler.steps == 3)
    stage.received["main.rank0"].clear()
    stage.restart("main.rank0")
    stage.send("main.rank0", Hello())
    stage.expect("main.rank0", Attach)
    stage.send("main.rank0", stage.attached())
    assert np.frombuffer(stage.expect("main.rank0", Step).starts, np.int32).tolist() == [0]
    answered: set[int] = set()

    def finished() -> bool:
        for step in [step for step in stage.steps() if step.number not in answered]:
            answered.add(step.number)
            count = len(step.tokens) // 4
            prompt = [TopLogprobs(0, np.zeros(count, np.float32).tobytes())] if any(f & 2 for f in step.flags) else []
            drawn = sum(1 for flags in step.flags if flags & SAMPLE)
            stage.send("main.rank0", StepResult(step.number, b"\x05\0\0\0" * drawn, prompt_logprobs=prompt))
        return bool(stage.events() and stage.events()[-1].finish)

    stage.until(finished)
    assert [len(event.prompt_logprobs or ()) for event in stage.events()] == [20, 0]


def test_a_step_longer_than_the_silence_allowed_is_not_repeated(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.actors.scheduler.engine.RANK_SILENCE_S", 0.0)
    stage.send("ingress0", generate(max_tokens=1))
    step = stage.expect("main.rank0", Step)
    stage.received["main.rank0"].clear()
    stage.scheduler._watch_ranks()
    stage.expect("main.rank0", Attach)
    stage.answer(step)
    stage.send("main.rank0", stage.attached())
    stage.until(lambda: stage.events() and stage.events()[-1].finish == "length")
    assert not stage.steps()
