"""An answer that only repeats itself ends, where it is asked for, at the same token however it is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stage import Stage, generate

from llm_runtime.actors.messages import Generate, SamplingParams, TextParams
from llm_runtime.actors.scheduler.request import REPEATED_TOKENS, Request


def request_of(output: list[int], **sampling: int) -> Request:
    params = SamplingParams(max_tokens=10_000, seed=0, **sampling)
    packed = np.array(output, "<i4").tobytes()
    return Request(Generate("r", 0, np.array([7] * 50, "<i4").tobytes(), params, TextParams(), packed), "i", 1, 16)


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ([7] * 3, False),
        ([7] * 4, True),
        ([1, 2] * 4, True),
        ([9, 1, 2] + [1, 2] * 3, True),
        ([1, 2] * 4 + [1], True),  # (2, 1) four times
        ([1, 2] * 3 + [1], False),
        ([1, 2] * 4 + [3], False),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4, 6], False),
        (list(range(REPEATED_TOKENS)) * 4, True),
        (list(range(REPEATED_TOKENS + 1)) * 4, False),
        ([], False),
    ],
)
def test_what_repeats_itself(output: list[int], wanted: bool) -> None:
    assert request_of(output, max_repeats=4).repeats is wanted
    assert not request_of(output).repeats
    assert not request_of(output, max_repeats=4, min_tokens=1000).repeats


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("known", range(4))
def test_an_answer_ends_at_the_same_token_when_it_is_made_again(stage: Stage, known: int) -> None:
    """The stage draws the same token each time; the ingress has some of them already."""
    sampling = SamplingParams(max_tokens=50, seed=1, max_repeats=4)
    output = np.full(known, 5, np.int32).tobytes()
    stage.send("ingress0", generate(attempt=known, sampling=sampling, output=output))
    stage.until(lambda: stage.scheduler.requests)
    stage.generate_all()
    (last,) = (event for event in stage.events() if event.finish)
    assert (last.finish, last.index + len(last.tokens)) == ("length", 4)
