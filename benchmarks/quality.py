"""What each type of weights costs in quality: perplexity, and agreement with float32.

    python benchmarks/quality.py [--model smollm2-135m-instruct] [--dtypes float32 bfloat16 int8 int4] [--decode]

Perplexity is over runtime/bench/prose.txt and benchmarks/data/code.txt, in windows of 512 tokens, each read from its
beginning.
Agreement is teacher-forced: float32 answers each prompt of tests/rank/prompts.json greedily, and the others are asked
for their most likely token at every position of that answer. A token that differs does not shift those after it.

Kernels may take another way for the many rows of a prompt than for the few of a decode step. Here all positions are
computed together; `--decode` computes them as decode steps do (which is what deterministic mode promises).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actors.messages import PROMPT_LOGPROBS, SAMPLE, OpenSlot, SamplingParams, Step, StepResult
from actors.rank import Executor, RankConfig, build_executor
from actors.vocabulary import load_vocabulary
from runtime.models import resolve_model

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"prose": ROOT / "runtime/bench/prose.txt", "code": ROOT / "benchmarks/data/code.txt"}
PAGE_SIZE, WINDOW = 16, 512
DTYPES = ("float32", "bfloat16", "int8", "int4")


class Reading(NamedTuple):
    """What a model makes of a sequence of n tokens: logprobs of those from the second on, float32 [n - 1], and the most
    likely tokens in their places, int32 [n - 1]."""

    logprobs: NDArray[np.float32]
    likeliest: NDArray[np.int32]


class Reader:
    """Runs one sequence at a time."""

    def __init__(self, model: Path, dtype: str, length: int, decode: bool) -> None:
        pages = -(-length // PAGE_SIZE)
        config = RankConfig(
            str(model),
            dtype,  # type: ignore[arg-type]
            num_pages=pages,
            max_slots=1,
            max_model_len=pages * PAGE_SIZE,
            page_size=PAGE_SIZE,
            deterministic=decode,
            threads=os.cpu_count() or 1,
        )
        self.executor: Executor = build_executor(config)
        self._pages = _i32([number for page in range(pages) for number in (0, page, page)])
        self._steps = 0

    def read(self, tokens: list[int]) -> Reading:
        """Logprobs of a sequence's tokens."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=1)
        result = self._step(0, tokens, PROMPT_LOGPROBS, [OpenSlot(0, len(tokens), sampling)])
        (entry,) = result.prompt_logprobs
        return Reading(np.frombuffer(entry.logprobs, np.float32)[1:], np.frombuffer(entry.top_ids, np.int32)[1:])

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """The `count` tokens that greedily follow a prompt."""
        opens = [OpenSlot(0, len(prompt), SamplingParams(max_tokens=count, seed=0, temperature=0.0))]
        tokens = list(prompt)
        for _ in range(count):
            start = 0 if opens else len(tokens) - 1
            result = self._step(start, tokens[start:], SAMPLE, opens)
            tokens += np.frombuffer(result.tokens, np.int32).tolist()
            opens = []
        return tokens[len(prompt) :]

    def _step(self, start: int, tokens: list[int], flag: int, opens: list[OpenSlot]) -> StepResult:
        self._steps += 1
        pages = self._pages if opens else b""
        rows = [_i32([value]) for value in (0, start, len(tokens))]
        return self.executor.execute(Step(self._steps, *rows, bytes([flag]), _i32(tokens), pages, opens))


def _i32(values: list[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def perplexity(reader: Reader, tokens: list[int]) -> float:
    """Of a text, in windows of WINDOW tokens."""
    windows = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - 1, WINDOW)]
    logprobs = np.concatenate([reader.read(window).logprobs for window in windows if len(window) > 1])
    return float(np.exp(-logprobs.astype(np.float64).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--decode", action="store_true", help="compute as decode steps do")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    model = resolve_model(options.model, ROOT).path
    vocabulary = load_vocabulary(model)
    texts = [vocabulary.encode(path.read_text(), False) for path in TEXTS.values()]
    prompts: list[list[int]] = list(json.loads((ROOT / "tests/rank/prompts.json").read_text()).values())

    reader = Reader(model, "float32", max(WINDOW, max(map(len, prompts)) + options.tokens), options.decode)
    answers = [reader.answer(prompt, options.tokens) for prompt in prompts]
    total = options.tokens * len(prompts)
    print(f"perplexity of {len(texts[0])} tokens of prose and {len(texts[1])} of code; agreement over {total} tokens\n")
    print("| dtype | weights MiB | prose | code | both | over float32 | agreement |\n|---|---|---|---|---|---|---|")
    base = float("nan")
    for dtype in ["float32", *(each for each in options.dtypes if each != "float32")]:
        if dtype != "float32":
            reader = Reader(model, dtype, reader.executor.config.max_model_len, options.decode)
        each = [perplexity(reader, text) for text in texts]
        weights = [len(text) / sum(map(len, texts)) for text in texts]
        both = float(np.exp(np.dot(weights, np.log(each))))
        base = both if dtype == "float32" else base
        equal = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            likeliest = reader.read(prompt + answer).likeliest[len(prompt) - 1 :]
            equal += int(np.count_nonzero(likeliest == np.array(answer)))
        print(
            f"| {dtype} | {reader.executor.weights_bytes / 2**20:.0f} | {each[0]:.3f} | {each[1]:.3f} | {both:.3f} "
            f"| {100 * (both / base - 1):+.2f} % | {100 * equal / total:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
