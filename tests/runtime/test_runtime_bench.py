"""The load of `runtime bench`, and its figures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_runtime.actors.messages import SAMPLE, Step
from llm_runtime.runtime.bench.executor import Batch, run_batch
from llm_runtime.runtime.bench.figures import percentile, summary
from llm_runtime.runtime.bench.serving import Outcome, passages


@dataclass
class Recorder:
    """Stands in for an executor and keeps its steps."""

    vocab_size: int = 100
    config: Any = field(default_factory=lambda: SimpleNamespace(page_size=4))
    steps: list[Step] = field(default_factory=list)

    def execute(self, step: Step) -> None:
        self.steps.append(step)


def int32s(data: bytes) -> list[int]:
    return [int(value) for value in np.frombuffer(data, np.int32)]


def test_steps_of_a_batch() -> None:
    """Three requests of 6 + 3 tokens in two slots, 4 prompt tokens a step."""
    recorder = Recorder()
    timings = run_batch(recorder, Batch(requests=3, slots=2, input_tokens=6, output_tokens=3, chunk_tokens=4))  # type: ignore[arg-type]
    rows = [
        list(zip(int32s(step.slots), int32s(step.starts), int32s(step.lengths), step.flags, strict=True))
        for step in recorder.steps
    ]
    assert rows == [
        [(1, 0, 4, 0)],
        [(1, 4, 2, SAMPLE), (0, 0, 2, 0)],
        [(1, 6, 1, SAMPLE), (0, 2, 4, SAMPLE)],
        [(1, 7, 1, SAMPLE), (0, 6, 1, SAMPLE)],
        [(0, 7, 1, SAMPLE), (1, 0, 4, 0)],
        [(1, 4, 2, SAMPLE)],
        [(1, 6, 1, SAMPLE)],
        [(1, 7, 1, SAMPLE)],
    ]
    assert [int32s(step.tokens)[0] for step in recorder.steps if step.lengths == np.int32(1).tobytes()] == [-1, -1]
    assert int32s(recorder.steps[0].pages) == [1, 0, 3, 1, 1, 4, 1, 2, 5, 0, 0, 0, 0, 1, 1, 0, 2, 2]
    assert [len(step.new_requests) for step in recorder.steps] == [2, 0, 0, 0, 1, 0, 0, 0]
    assert [(timing.prefilled, timing.decoded) for timing in timings] == [
        (4, 0), (4, 0), (4, 1), (0, 2), (4, 1), (2, 0), (0, 1), (0, 1)
    ]  # fmt: skip


def test_passages_are_prose_and_share_no_prefix() -> None:
    texts = passages(200, 2000, random.Random(1))
    assert {len(text.split()) for text in texts} == {2000}
    assert len({text.split()[0] for text in texts}) == 200
    assert all("the lighthouse" in text.lower() for text in texts)
    assert texts == passages(200, 2000, random.Random(1)) != passages(200, 2000, random.Random(2))


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([5.0], 1) == 5.0
    assert str(percentile([], 50)) == "nan"


def test_figures_of_a_benchmark() -> None:
    outcomes = [
        Outcome(arrivals=[0.5, 0.6, 0.8], tokens=4, prompt_tokens=10),
        Outcome(arrivals=[0.1], tokens=1, prompt_tokens=10),
        Outcome(error="status 500"),
    ]
    figures = summary(outcomes, 2.0)
    assert (figures["requests"], figures["failed"]) == (3, 1)
    assert (figures["output_tokens_per_s"], figures["input_tokens_per_s"]) == (2.5, 10.0)
    assert figures["ttft_mean_ms"] == pytest.approx(300)
    assert figures["tpot_mean_ms"] == pytest.approx(100)
    assert figures["itl_mean_ms"] == pytest.approx(150)
    assert figures["latency_p50_ms"] == pytest.approx(450)
