"""The executor against transformers on SmolLM2: the same greedy tokens, however the work is cut into steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import PAGE_SIZE, Driver, Sequence, generate, rank_config

from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import Executor, build_executor


def test_prompts_are_varied(prompts: list[list[int]]) -> None:
    assert len(prompts) >= 20
    assert min(map(len, prompts)) <= 2
    assert max(map(len, prompts)) > 1000


def test_in_one_batch(batched: list[Sequence], expected: list[list[int]]) -> None:
    assert [sequence.output for sequence in batched] == expected


def test_logprobs(batched: list[Sequence], logits: list[torch.Tensor]) -> None:
    for sequence, sequence_logits in zip(batched, logits, strict=True):
        values = torch.log_softmax(sequence_logits, -1)
        for entry, row, token in zip(sequence.logprobs, values, sequence.output, strict=True):
            assert entry.top == 5
            np.testing.assert_allclose(np.frombuffer(entry.logprobs, np.float32), [row[token]], atol=1e-3)
            top = np.frombuffer(entry.top_ids, np.int32)
            values_of_top = row[top.tolist()]
            np.testing.assert_allclose(np.frombuffer(entry.top_logprobs, np.float32), values_of_top, atol=1e-3)
            np.testing.assert_allclose(values_of_top, row.topk(5).values, atol=1e-3)


def test_int8_cache(smollm2: Path, executor: Executor, prompts: list[list[int]]) -> None:
    """The logits of prompts, as far as their own tokens tell, are close to those with a float32 cache."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)
    chosen = [prompts[index] for index in (0, 3, 7, -2)]
    quantized = build_executor(rank_config(smollm2, kv_dtype="int8"))
    assert quantized.fingerprint != executor.fingerprint
    exact, close = (
        np.concatenate([sequence.prompt_logprobs[1:] for sequence in generate(each, chosen, sampling, chunk=64)])
        for each in (executor, quantized)
    )
    assert len(exact) > 250
    assert 0 < np.abs(exact - close).mean() < 0.03


@pytest.mark.parametrize("tokens", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_alone(executor: Executor, prompts: list[list[int]], expected: list[list[int]], tokens: int) -> None:
    sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0.0)
    sequences = generate(executor, prompts, sampling, alone=True)
    assert [sequence.output for sequence in sequences] == [output[:tokens] for output in expected]


def test_in_chunks(executor: Executor, prompts: list[list[int]], expected: list[list[int]]) -> None:
    sampling = SamplingParams(max_tokens=16, seed=0, temperature=0.0)
    sequences = generate(executor, prompts[:19], sampling, chunk=17)
    assert [sequence.output for sequence in sequences] == [output[:16] for output in expected[:19]]


@pytest.mark.parametrize("chunk", [100, 500])
def test_in_longer_chunks(executor: Executor, prompts: list[list[int]], expected: list[list[int]], chunk: int) -> None:
    sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    sequences = generate(executor, prompts[-2:], sampling, chunk=chunk)
    assert [sequence.output for sequence in sequences] == [output[:4] for output in expected[-2:]]


def test_chunks_of_one_token(executor: Executor, prompts: list[list[int]], expected: list[list[int]]) -> None:
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
    sequences = generate(executor, prompts[:18], sampling, chunk=1)
    assert [sequence.output for sequence in sequences] == [output[:8] for output in expected[:18]]


def test_prefix_reuse(executor: Executor, prompts: list[list[int]], expected: list[list[int]]) -> None:
    driver = Driver(executor)
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
    long = [index for index, prompt in enumerate(prompts) if len(prompt) > PAGE_SIZE]
    first = [driver.sequence(slot, prompts[index], sampling) for slot, index in enumerate(long)]
    driver.run(first)
    second = []
    for slot, (index, sequence) in enumerate(zip(long, first, strict=True)):
        shared = sequence.pages[: (len(prompts[index]) - 1) // PAGE_SIZE]
        second.append(driver.sequence(len(long) + slot, prompts[index], sampling, shared))
    assert all(sequence.computed for sequence in second)
    driver.run(second)
    assert [sequence.output for sequence in second] == [expected[index][:8] for index in long]


def test_resumed_with_the_tokens_so_far(
    executor: Executor, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    driver = Driver(executor)
    sampling = SamplingParams(max_tokens=28, seed=0, temperature=0.0)
    sequences = [driver.sequence(slot, prompt, sampling) for slot, prompt in enumerate(prompts[:12])]
    for slot, sequence in enumerate(sequences):
        sequence.output = expected[slot][: 2 * slot]
    driver.run(sequences, explicit=True)
    assert [sequence.output for sequence in sequences] == [output[:28] for output in expected[:12]]


def test_steps_run_twice(executor: Executor, prompts: list[list[int]], expected: list[list[int]]) -> None:
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
    sequences = generate(executor, prompts[:12], sampling, chunk=7, repeat=True)
    assert [sequence.output for sequence in sequences] == [output[:8] for output in expected[:12]]


@pytest.mark.parametrize("chunk", [1 << 30, 150])
def test_prompt_logprobs(executor: Executor, prompts: list[list[int]], reference: Any, chunk: int) -> None:
    chosen = [prompts[2], prompts[18], prompts[5]]
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=3)
    for sequence in generate(executor, chosen, sampling, chunk=chunk):
        ids = torch.tensor([sequence.prompt])
        with torch.inference_mode():
            values = torch.log_softmax(reference(ids).logits[0, :-1].float(), -1)
        wanted = values.gather(1, ids[0, 1:, None])[:, 0]
        assert np.isnan(sequence.prompt_logprobs[0])
        np.testing.assert_allclose(sequence.prompt_logprobs[1:], wanted, atol=1e-3)
