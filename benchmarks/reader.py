"""Runs sequences through a rank's executor in this process: what it answers, and how likely it finds a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from llm_runtime.actors.dtypes import WeightDType
from llm_runtime.actors.kv_format import KVDType
from llm_runtime.actors.messages import PROMPT_LOGPROBS, SAMPLE, NewRequest, SamplingParams, Step, StepResult
from llm_runtime.actors.rank import Executor, RankConfig, build_executor
from llm_runtime.runtime.cgroups import cpu_count

PAGE_SIZE = 16
REPORTED = 128
"""How many of the likeliest tokens are told for each token of an answer."""


class Answer(Struct):
    """An answer of n tokens, its end-of-sequence token included, and the likeliest tokens in the place of each.

    Attributes:
        ids: int32 [n, REPORTED], the likeliest first. logprobs: float32 [n, REPORTED]. Empty if not known.
    """

    tokens: list[int]
    ids: bytes = b""
    logprobs: bytes = b""


class Reader:
    """Runs sequences of up to `length` tokens, up to `streams` at a time. Raises StartFailure for types that the model
    cannot have."""

    def __init__(
        self, model: Path, dtype: WeightDType, kv_dtype: KVDType, length: int, streams: int, deterministic: bool
    ) -> None:
        self._pages = -(-length // PAGE_SIZE)
        config = RankConfig(
            str(model),
            dtype,
            kv_dtype=kv_dtype,
            num_pages=self._pages * streams,
            max_slots=streams,
            max_model_len=self._pages * PAGE_SIZE,
            page_size=PAGE_SIZE,
            deterministic=deterministic,
            threads=cpu_count(),
        )
        self.executor: Executor = build_executor(config)
        self._streams = streams
        self._steps = 0

    def logprobs(self, tokens: list[int]) -> NDArray[np.float32]:
        """Of a sequence's n tokens from the second on, read at once: float32 [n - 1]."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=1)
        (entry,) = self._step([0], [0], [tokens], PROMPT_LOGPROBS, sampling).prompt_logprobs
        return np.frombuffer(entry.logprobs, np.float32)[1:]

    def answers(self, prompts: Sequence[list[int]], count: int, eos: Sequence[int]) -> list[Answer]:
        """What follows each prompt greedily: up to `count` tokens, or to the end of the answer."""
        return [each for at in self._groups(prompts) for each in self._answer(prompts[at], [], count, eos)]

    def follow(self, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> list[Answer]:
        """What is chosen in the place of each token of given answers, after those before it. It is the reader's own
        answer as far as that is the given one, and the token after."""
        return [each for at in self._groups(prompts) for each in self._answer(prompts[at], answers[at], 0, [])]

    def _groups(self, prompts: Sequence[list[int]]) -> list[slice]:
        return [slice(at, at + self._streams) for at in range(0, len(prompts), self._streams)]

    def _answer(
        self, prompts: Sequence[list[int]], given: Sequence[Answer], count: int, eos: Sequence[int]
    ) -> list[Answer]:
        """Answers as many prompts as there are slots. Each prompt is a step, then each token of all answers."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=REPORTED)
        answers = [Answer([]) for _ in prompts]
        slots = list(range(len(prompts)))
        for slot, prompt in enumerate(prompts):
            _extend(answers, [slot], self._step([slot], [0], [prompt], SAMPLE, sampling))
        while True:
            if given:
                slots = [slot for slot in slots if len(answers[slot].tokens) < len(given[slot].tokens)]
            else:
                slots = [slot for slot in slots if len(answers[slot].tokens) < count]
                slots = [slot for slot in slots if answers[slot].tokens[-1] not in eos]
            if not slots:
                return answers
            ends = [len(answers[slot].tokens) - 1 for slot in slots]
            last = [[(given or answers)[slot].tokens[end]] for slot, end in zip(slots, ends, strict=True)]
            starts = [len(prompts[slot]) + end for slot, end in zip(slots, ends, strict=True)]
            _extend(answers, slots, self._step(slots, starts, last, SAMPLE))

    def _step(
        self,
        slots: list[int],
        starts: list[int],
        tokens: list[list[int]],
        flag: int,
        sampling: SamplingParams | None = None,
    ) -> StepResult:
        """A step with new tokens of some slots, which are opened if it is said how they are sampled."""
        self._steps += 1
        opens: list[NewRequest] = []
        pages: list[int] = []
        if sampling is not None:
            opens = [NewRequest(slot, len(new), sampling) for slot, new in zip(slots, tokens, strict=True)]
            for slot in slots:
                pages += chain(*([slot, page, slot * self._pages + page] for page in range(self._pages)))
        return self.executor.execute(
            Step(
                self._steps,
                _i32(slots),
                _i32(starts),
                _i32([len(new) for new in tokens]),
                bytes([flag] * len(slots)),
                _i32(list(chain(*tokens))),
                _i32(pages),
                opens,
            )
        )


def _i32(values: list[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def _extend(answers: list[Answer], slots: list[int], result: StepResult) -> None:
    """Adds a step's tokens to the answers of its slots."""
    for slot, token, entry in zip(slots, np.frombuffer(result.tokens, np.int32), result.logprobs, strict=True):
        answers[slot].tokens.append(int(token))
        answers[slot].ids += entry.top_ids
        answers[slot].logprobs += entry.top_logprobs
