"""What the tests of the rank share: a scheduler in a few lines, prompts, small checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_runtime.actors.messages import (
    PROMPT_LOGPROBS,
    SAMPLE,
    NewRequest,
    SamplingParams,
    Step,
    StepResult,
    TopLogprobs,
)
from llm_runtime.actors.rank import Executor, RankConfig

GREEDY = SamplingParams(max_tokens=64, seed=0, temperature=0.0)
PAGE_SIZE = 16


def i32(values: Any) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def ints(data: bytes) -> list[int]:
    return np.frombuffer(data, np.int32).tolist()


def rank_config(model: Path | str, **settings: Any) -> RankConfig:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "num_pages": 1024,
        "max_slots": 32,
        "max_model_len": 2048,
        "page_size": PAGE_SIZE,
    }
    return RankConfig(**{"model": str(model), **defaults, **settings})


@dataclass
class Sequence:
    slot: int
    prompt: list[int]
    sampling: SamplingParams
    pages: list[int]
    computed: int = 0
    opened: bool = False
    output: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Driver:
    """Plays the scheduler for one executor. Pages are handed out one after the other and never taken back."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.number = 0
        self.next_page = 0

    def sequence(
        self, slot: int, prompt: list[int], sampling: SamplingParams = GREEDY, shared: list[int] | None = None
    ) -> Sequence:
        """A sequence whose first pages are `shared`, filled by another with the same tokens."""
        shared = shared or []
        total = -(-(len(prompt) + sampling.max_tokens) // PAGE_SIZE)
        own = list(range(self.next_page, self.next_page + total - len(shared)))
        self.next_page += len(own)
        assert self.next_page <= self.executor.config.num_pages
        return Sequence(slot, prompt, sampling, shared + own, computed=len(shared) * PAGE_SIZE)

    def step(self, rows: list[tuple[Sequence, int]], explicit: bool = False) -> Step:
        """A step of (sequence, number of new tokens) rows. A drawn token is left to the rank unless `explicit`."""
        self.number += 1
        opens, pages, tokens, flags = [], [], [], []
        for sequence, length in rows:
            if not sequence.opened:
                history = i32(sequence.tokens) if sequence.sampling.needs_history else b""
                opens.append(NewRequest(sequence.slot, len(sequence.prompt), sequence.sampling, history))
                pages.extend((sequence.slot, index, page) for index, page in enumerate(sequence.pages))
                sequence.opened, explicit_row = True, True
            else:
                explicit_row = explicit
            end = sequence.computed + length
            new = sequence.tokens[sequence.computed : end]
            if sequence.output and sequence.computed == len(sequence.tokens) - 1 and not explicit_row:
                new = [-1]
            tokens.extend(new)
            flag = SAMPLE if end == len(sequence.tokens) else 0
            if sequence.sampling.prompt_logprobs >= 0 and end <= len(sequence.prompt):
                flag |= PROMPT_LOGPROBS
            flags.append(flag)
        return Step(
            self.number,
            i32([sequence.slot for sequence, _ in rows]),
            i32([sequence.computed for sequence, _ in rows]),
            i32([length for _, length in rows]),
            bytes(flags),
            i32(tokens),
            i32(pages),
            opens,
        )

    def apply(self, rows: list[tuple[Sequence, int]], step: Step, result: StepResult) -> None:
        assert result.number == step.number
        drawn = iter(ints(result.tokens))
        logprobs = {entry.row: entry for entry in result.logprobs}
        for row, ((sequence, length), flag) in enumerate(zip(rows, step.flags, strict=True)):
            sequence.computed += length
            if flag & SAMPLE:
                sequence.output.append(next(drawn))
                if row in logprobs:
                    sequence.logprobs.append(logprobs[row])
        assert next(drawn, None) is None
        for entry in result.prompt_logprobs:
            rows[entry.row][0].prompt_logprobs.extend(np.frombuffer(entry.logprobs, np.float32).tolist())

    def run(
        self, sequences: list[Sequence], chunk: int = 1 << 30, explicit: bool = False, repeat: bool = False
    ) -> None:
        """Runs all together until each has its `max_tokens`; prompts in chunks. `repeat` runs each step twice."""
        while True:
            rows = [
                (sequence, min(chunk, len(sequence.tokens) - sequence.computed))
                for sequence in sequences
                if len(sequence.output) < sequence.sampling.max_tokens
            ]
            if not rows:
                return
            step = self.step(rows, explicit)
            result = self.executor.execute(step)
            if repeat:
                again = self.executor.execute(step)
                assert (again.tokens, again.logprobs) == (result.tokens, result.logprobs)
            self.apply(rows, step, result)


def generate(
    executor: Executor, prompts: list[list[int]], sampling: SamplingParams = GREEDY, alone: bool = False, **how: Any
) -> list[Sequence]:
    """Runs prompts, together or one after the other."""
    driver = Driver(executor)
    sequences = [driver.sequence(slot, prompt, sampling) for slot, prompt in enumerate(prompts)]
    for batch in [[sequence] for sequence in sequences] if alone else [sequences]:
        driver.run(batch, **how)
    return sequences


def save_model(directory: Path, architecture: str, **overrides: Any) -> Any:
    """Makes a tiny random model with transformers, saves it, and returns it."""
    import torch
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    config_type = getattr(transformers, architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Config")
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_type(**{**small, **overrides})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide mistakes
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(directory)
    return model


# Texts and their token ids in SmolLM2's vocabulary.
_SHORT: dict[str, list[int]] = json.loads(Path(__file__).with_name("prompts.json").read_text())
_WATER = [36411, 418, 216, 33, 32, 32, 5027, 30]  # " boils at 100 degrees."
_GROUP = [6530, 28, 253, 1528, 314, 253, 932, 351, 354, 4953, 338, 314, 1736, 791, 30]  # " mathematics, a group is …"
PROMPTS = [
    *_SHORT.values(),
    [12615, *_WATER, *([4643, *_WATER] * 29), 1644, 913],
    [788, *_GROUP, *([533, *_GROUP] * 65), 4882],
]
"""Prompts of SmolLM2, in several languages; the last two have 272 and 1057 tokens."""
