"""The bare executor under load: what the model itself takes, without actors, messages or HTTP."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.messages import SAMPLE, NewRequest, SamplingParams, Step
from llm_runtime.actors.rank import Executor, RankConfig, build_executor
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.plan import NodePlan


@dataclass(frozen=True)
class Batch:
    """What is computed: `requests` prompts of random tokens, at most `slots` at a time.

    Attributes:
        input_tokens, output_tokens: of each request.
        chunk_tokens: most prompt tokens of one step.
        temperature: of the draws; 0 takes the most likely tokens.
    """

    requests: int
    slots: int
    input_tokens: int
    output_tokens: int
    chunk_tokens: int
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True)
class Timing:
    """One step: seconds, prompt tokens, and rows that decoded."""

    duration_s: float
    prefilled: int
    decoded: int


@dataclass
class _Request:
    slot: int
    prompt: NDArray[np.int32]
    prefilled: int = 0
    produced: int = 0


def executor_for(plan: NodePlan, batch: Batch) -> Executor:
    """An executor with the model and settings of a topology's first engine, and memory for the batch.

    Raises UserError if the topology or the batch cannot be run in one process.
    """
    engine, model = plan.engines[0], plan.models[0]
    if engine.settings.tp > 1:
        raise UserError(f"the bare executor is one process: add --set engine.{engine.name}.tp=1")
    length = batch.input_tokens + batch.output_tokens
    if length > model.config.max_position:
        raise UserError(
            f"{length} tokens are over the model's limit of {model.config.max_position}: shorten the requests"
        )
    config = RankConfig(
        model=str(model.model.path),
        dtype=engine.dtype,
        kv_dtype=engine.kv_dtype,
        num_pages=batch.slots * _pages_each(length, engine.settings.page_size),
        max_slots=batch.slots,
        max_model_len=length,
        page_size=engine.settings.page_size,
        max_step_tokens=batch.chunk_tokens + batch.slots,
        deterministic=model.settings.deterministic,
        device=engine.settings.device,
        threads=engine.threads,
    )
    return build_executor(config)


def run_batch(executor: Executor, batch: Batch) -> list[Timing]:
    """Runs the batch to its end: each step decodes all running requests and prefills what fits beside them."""
    draw = np.random.default_rng(batch.seed)
    shape = (batch.requests, batch.input_tokens)
    prompts = deque(draw.integers(0, executor.vocab_size, shape, dtype=np.int32))
    free = list(range(batch.slots))
    running: list[_Request] = []
    timings: list[Timing] = []
    while prompts or running:
        opened = [_Request(free.pop(), prompts.popleft()) for _ in range(min(len(free), len(prompts)))]
        running += opened
        step, timing = _next_step(len(timings) + 1, running, opened, executor.config.page_size, batch)
        began = time.perf_counter()
        executor.execute(step)
        timings.append(Timing(time.perf_counter() - began, *timing))
        free += [request.slot for request in running if request.produced == batch.output_tokens]
        running = [request for request in running if request.produced < batch.output_tokens]
    return timings


def _next_step(
    number: int, running: list[_Request], opened: list[_Request], page_size: int, batch: Batch
) -> tuple[Step, tuple[int, int]]:
    """The next step, with its prompt tokens and decoding rows; counts it as done in the requests."""
    rows: list[tuple[int, int, int, int]] = []
    tokens: list[NDArray[np.int32]] = []
    budget = batch.chunk_tokens
    decoded = 0
    for request in running:
        if request.prefilled == batch.input_tokens:
            start, new = batch.input_tokens + request.produced - 1, np.array([-1], np.int32)
            decoded += 1
        elif budget:
            start = request.prefilled
            new = request.prompt[start : start + budget]
            budget -= len(new)
            request.prefilled += len(new)
        else:
            continue
        samples = request.prefilled == batch.input_tokens
        request.produced += samples
        rows.append((request.slot, start, len(new), SAMPLE if samples else 0))
        tokens.append(new)
    slots, starts, lengths, flags = np.array(rows, np.int32).T
    each = _pages_each(batch.input_tokens + batch.output_tokens, page_size)
    pages = [(request.slot, index, request.slot * each + index) for request in opened for index in range(each)]
    sampling = SamplingParams(max_tokens=batch.output_tokens, seed=batch.seed, temperature=batch.temperature)
    step = Step(
        number=number,
        slots=slots.tobytes(),
        starts=starts.tobytes(),
        lengths=lengths.tobytes(),
        flags=flags.astype(np.uint8).tobytes(),
        tokens=np.concatenate(tokens).tobytes(),
        pages=np.array(pages, np.int32).tobytes(),
        new_requests=[NewRequest(request.slot, batch.input_tokens, sampling) for request in opened],
    )
    return step, (batch.chunk_tokens - budget, decoded)


def _pages_each(length: int, page_size: int) -> int:
    return -(-length // page_size)
