"""When guesses are verified, and that the scheduler's answers are those of plain decoding then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_actor import NUM_PAGES, Stage
from test_batch import SimulatedRank

from llm_runtime.actors.messages import (
    SAMPLE,
    VERIFY,
    Attach,
    Generate,
    Hello,
    SamplingParams,
    Step,
    StepResult,
    Stopped,
    TextParams,
    TopLogprobs,
)
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.request import Request
from llm_runtime.actors.scheduler.speculation import TRY_AGAIN, Speculation
from llm_runtime.actors.scheduler.step_times import StepTimes

LOOP = [11, 12, 13, 14]
STOP = 2


def next_token(tokens: list[int]) -> int:
    """The model of these tests: goes round in a circle, and leaves it at some positions."""
    position = len(tokens)
    return 20 + position if position % 17 == 0 else LOOP[position % len(LOOP)]


class FakeRank:
    """Answers steps from what stands in the pages."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.rank = SimulatedRank(next_token)
        self.answered: list[Step] = []
        self.verified = 0
        self.logprobs = False

    def answer(self) -> None:
        """Answers the steps that have come since the last time, and none that came before an `Attach`."""
        for step in steps_after_attach(self.stage):
            if not any(step is each for each in self.answered):
                self.answered.append(step)
                self.stage.send("main.rank0", self.result(step))

    def result(self, step: Step) -> StepResult:
        lengths = np.frombuffer(step.lengths, np.int32).tolist()
        draws = [
            length if flags & VERIFY else flags & SAMPLE for length, flags in zip(lengths, step.flags, strict=True)
        ]
        self.verified += sum(bool(flags & VERIFY) for flags in step.flags)
        tokens = self.rank.execute(step)
        rows = [row for row, count in enumerate(draws) for _ in range(count)]
        logprobs = [
            TopLogprobs(row, np.float32(-token).tobytes())
            for row, token in zip(rows, tokens, strict=True)
            if self.logprobs
        ]
        return StepResult(step.number, np.array(tokens, np.int32).tobytes(), logprobs, duration_s=0.01)


def steps_after_attach(stage: Stage) -> list[Step]:
    steps: list[Step] = []
    for message in stage.received["main.rank0"]:
        if isinstance(message, Step):
            steps.append(message)
        elif isinstance(message, Attach):
            steps.clear()
    return steps


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != STOP):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path, **{"speculation": "ngram", **getattr(request, "param", {})})
    for size in (1, 1000):
        made.scheduler.speculation.times.observe(size, 0.01)
    yield made
    made.scheduler.mailbox.close()
    for mailbox in made.mailboxes.values():
        mailbox.close()


def ask(rid: str, prompt: list[int], max_tokens: int, **sampling: Any) -> Generate:
    params = SamplingParams(max_tokens=max_tokens, seed=1, stop_token_ids=sampling.pop("stops", [STOP]), **sampling)
    return Generate(rid, 0, np.array(prompt, np.int32).tobytes(), params, TextParams())


def outputs(stage: Stage) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in stage.events():
        tokens = found.setdefault(event.rid, [])
        assert event.index == len(tokens)
        tokens += event.tokens
    return found


def run(stage: Stage, rank: FakeRank, until: Callable[[], Any] | None = None) -> None:
    """Answers steps until all requests have arrived, or until something else holds."""

    def done() -> bool:
        if until is not None and until():
            return True
        rank.answer()
        arrived = {event.rid for event in stage.events() if event.finish}
        return until is None and bool(arrived) and set(stage.scheduler.requests) == arrived

    stage.until(done)


PROMPTS = {"a": LOOP * 3, "b": [5, *LOOP * 2], "c": [1, 2, 3], "d": LOOP * 2 + [9]}


def test_the_tokens_are_those_of_plain_decoding(stage: Stage) -> None:
    for rid, prompt in PROMPTS.items():
        stage.send("ingress0", ask(rid, prompt, 40))
    rank = FakeRank(stage)
    run(stage, rank)
    assert outputs(stage) == {rid: expected(prompt, 40) for rid, prompt in PROMPTS.items()}
    assert rank.verified
    figures = stage.scheduler.stats()
    assert 0 < figures["spec_accepted_tokens"] <= figures["spec_draft_tokens"]
    assert figures["spec_accept_length"] > 2
    assert stage.scheduler.steps < 40
    assert stage.scheduler.pool.available == NUM_PAGES
    assert figures["generation_tokens"] == 160


@pytest.mark.parametrize("count", range(1, 24))
def test_exactly_as_many_tokens_as_wanted(stage: Stage, count: int) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, count))
    rank = FakeRank(stage)
    run(stage, rank)
    assert outputs(stage) == {"r": expected(LOOP * 3, count)}
    assert stage.events()[-1].finish == "length"


@pytest.mark.parametrize("stage", [{"max_model_len": 31}], indirect=True)
def test_no_guess_goes_beyond_max_model_len(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 19))
    rank = FakeRank(stage)
    run(stage, rank)
    assert outputs(stage) == {"r": expected(LOOP * 3, 19)}
    assert (
        max((np.frombuffer(s.starts, np.int32) + np.frombuffer(s.lengths, np.int32)).max() for s in stage.steps()) < 31
    )


def test_a_stop_token_among_right_guesses_ends_the_request(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 40, stops=[14]))
    rank = FakeRank(stage)
    run(stage, rank)
    assert outputs(stage) == {"r": [11, 12, 13, 14]}
    assert stage.events()[-1].finish == "stop"
    stage.send("ingress0", ask("again", LOOP * 4, 5))
    stage.until(lambda: "again" in stage.scheduler.requests)
    run(stage, rank)
    assert outputs(stage)["again"] == expected(LOOP * 4, 5), "what the tree has of the first is right"


@pytest.mark.parametrize("repeats", [2, 3])
def test_an_answer_that_repeats_itself_ends_among_right_guesses(stage: Stage, repeats: int) -> None:
    """At the token at which it ends in plain decoding."""
    whole = expected(LOOP * 3, 40)
    count = next(n for n in range(40) if whole[n - 4 * repeats : n] == whole[n - 4 : n] * repeats and n >= 4 * repeats)
    stage.send("ingress0", ask("r", LOOP * 3, 40, max_repeats=repeats))
    rank = FakeRank(stage)
    run(stage, rank)
    assert rank.verified
    assert outputs(stage) == {"r": whole[:count]}
    assert stage.events()[-1].finish == "length"
    assert stage.scheduler.pool.available == NUM_PAGES


def test_logprobs_come_for_accepted_tokens_only(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 20, logprobs=0))
    rank = FakeRank(stage)
    rank.logprobs = True
    run(stage, rank)
    assert rank.verified
    for event in stage.events():
        assert [each.token for each in event.logprobs or []] == event.tokens
        assert [each.logprob for each in event.logprobs or []] == [-token for token in event.tokens]


def test_requests_with_penalties_are_not_guessed(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 20, frequency_penalty=0.1))
    rank = FakeRank(stage)
    run(stage, rank)
    assert outputs(stage) == {"r": expected(LOOP * 3, 20)}
    assert not rank.verified


def verifying(stage: Stage) -> bool:
    return bool(stage.scheduler.in_flight) and stage.scheduler.in_flight[-1].speculative


def test_a_rank_that_dies_verifying(stage: Stage) -> None:
    for rid, prompt in PROMPTS.items():
        stage.send("ingress0", ask(rid, prompt, 40))
    rank = FakeRank(stage)
    run(stage, rank, until=lambda: verifying(stage))
    guessed = [row.request for row in stage.scheduler.in_flight[-1].rows if row.draft]
    stage.restart("main.rank0")
    stage.received["main.rank0"].clear()
    stage.send("main.rank0", Hello())
    stage.expect("main.rank0", Attach)
    assert all(not request.pending for request in stage.scheduler.requests.values())
    stage.send("main.rank0", stage.attached())
    assert guessed
    assert not any(request.speculates for request in guessed), "guesses may be what it died of"
    rank.rank.reset()
    run(stage, rank)
    assert outputs(stage) == {rid: expected(prompt, 40) for rid, prompt in PROMPTS.items()}
    assert stage.scheduler.pool.available == NUM_PAGES


def test_a_lost_answer_of_a_step_that_verifies(stage: Stage) -> None:
    """The ranks attach again and get the very same step."""
    stage.send("ingress0", ask("r", LOOP * 3, 40))
    rank = FakeRank(stage)
    run(stage, rank, until=lambda: verifying(stage))
    step = stage.until(lambda: [s for s in stage.steps() if any(flags & VERIFY for flags in s.flags)])[0]
    stage.received["main.rank0"].clear()
    stage.scheduler._attach()
    stage.send("main.rank0", stage.attached())
    again = stage.expect("main.rank0", Step)
    assert (again.number, again.starts, again.lengths, again.flags, again.tokens) == (
        *(step.number, step.starts, step.lengths, step.flags, step.tokens),
    )
    run(stage, rank)
    assert outputs(stage) == {"r": expected(LOOP * 3, 40)}


def test_a_scheduler_that_dies_while_guesses_are_verified(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 40))
    rank = FakeRank(stage)
    run(stage, rank, until=lambda: verifying(stage) and len(stage.scheduler.requests["r"].tokens) > 20)
    known = stage.scheduler.requests["r"].tokens[12:].tolist()
    computed = stage.scheduler.requests["r"].computed
    stage.scheduler.mailbox.close()
    stage.received["detokenizer"].clear()
    stage.received["main.rank0"].clear()
    stage.scheduler = stage.start(2)
    output = np.array(known, np.int32).tobytes()
    params = SamplingParams(max_tokens=40, seed=1, stop_token_ids=[STOP])
    stage.send("ingress0", Generate("r", 1, np.array(LOOP * 3, np.int32).tobytes(), params, TextParams(), output))
    stage.expect("main.rank0", Attach)
    first = stage.until(lambda: steps_after_attach(stage))[0]
    assert np.frombuffer(first.starts, np.int32).tolist() == [computed], "accepted tokens have their KV, guesses do not"
    run(stage, rank)
    new = [token for event in stage.events() if event.attempt == 1 for token in event.tokens]
    assert known + new == expected(LOOP * 3, 40)


def test_a_stop_string_that_is_found_while_guesses_are_verified(stage: Stage) -> None:
    stage.send("ingress0", ask("r", LOOP * 3, 60))
    rank = FakeRank(stage)
    run(stage, rank, until=lambda: verifying(stage))
    stage.send("detokenizer", Stopped("r", 0, 0))
    stage.until(lambda: stage.scheduler.requests["r"].finish)
    run(stage, rank, until=lambda: not stage.scheduler.in_flight)
    assert stage.scheduler.requests["r"].pending == 0
    assert stage.scheduler.pool.available == NUM_PAGES


# -- the choice ----------------------------------------------------------------------------------------------------


def config(**settings: Any) -> Config:
    names = dict.fromkeys(("engine", "model", "address", "leader", "detokenizer", "bootstrap"), "x")
    return Config(**names, page_size=4, num_pages=100, max_model_len=400, **settings)


def decoding(prompt: list[int], max_tokens: int = 100) -> Request:
    """A request whose last token is all that is left to compute."""
    request = Request(ask("r", prompt, max_tokens), "ingress0", 0, 4)
    request.computed = request.scheduled = len(prompt) - 1
    return request


def speculation(times: dict[int, float], **settings: Any) -> Speculation:
    made = Speculation(config(**settings), StepTimes())
    for size, seconds in times.items():
        made.times.observe(size, seconds)
    return made


def test_times_between_those_measured_are_interpolated() -> None:
    times = StepTimes()
    assert times.seconds(5) == 0.0
    times.observe(1, 0.010)
    times.observe(101, 0.110)
    assert times.seconds(1) == pytest.approx(0.010)
    assert times.seconds(51) == pytest.approx(0.060)
    assert times.seconds(404) == pytest.approx(0.220)
    for _ in range(50):
        times.observe(51, 0.020)
    assert times.seconds(51) == pytest.approx(0.020, rel=0.05)


def test_guesses_are_verified_where_further_tokens_are_cheap() -> None:
    cheap = speculation({1: 0.010, 256: 0.020})
    dear = speculation({1: 0.010, 256: 2.5})
    request = decoding(LOOP * 5)
    assert list(cheap.choose([request]).values()) == [(*LOOP, *LOOP, *LOOP, *LOOP[:3])]
    assert cheap.worth_waiting([request])
    assert dear.choose([request]) == {}
    assert not dear.worth_waiting([request])


def test_nothing_is_verified_before_steps_have_been_measured() -> None:
    assert speculation({}).choose([decoding(LOOP * 5)]) == {}


def test_long_pauses_speak_against_it() -> None:
    made = speculation({1: 0.001, 256: 0.002})
    for _ in range(100):
        made.observe_pause(0.02)
    assert made.choose([decoding(LOOP * 5)]) == {}
    alone = speculation({1: 0.001, 256: 0.002}, run_ahead=False)
    alone.pause_s = 0.02
    assert alone.choose([decoding(LOOP * 5)]), "without running ahead there is a pause after every step anyway"


def test_a_step_that_verifies_is_no_pause() -> None:
    made = speculation({1: 0.020, 8: 0.040, 16: 0.060, 256: 0.5})
    (guesses,) = made.choose([decoding(LOOP * 5)]).values()
    assert made.times.seconds(1 + len(guesses)) <= 0.05 < made.times.seconds(16)


def test_no_step_of_a_request_may_be_under_way() -> None:
    made = speculation({1: 0.010, 256: 0.020})
    request = decoding(LOOP * 5)
    request.scheduled += 1
    request.pending = 1
    assert made.choose([request]) == {}
    assert made.worth_waiting([request])


def test_a_request_that_is_being_computed_again_is_left_alone() -> None:
    made = speculation({1: 0.010, 256: 0.020})
    request = decoding(LOOP * 5)
    request.computed = request.scheduled = 8
    assert made.choose([request]) == {}


def test_what_looked_too_dear_is_tried_again_now_and_then() -> None:
    made = speculation({1: 0.010, 2: 0.5})
    request = decoding(LOOP * 10)
    tries = 0
    for _ in range(3 * TRY_AGAIN + 3):
        if made.worth_waiting([request]):
            assert made.choose([request])
            tries += 1
    assert tries == 3
