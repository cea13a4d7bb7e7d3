"""What all the isolation costs: throughput of a served node over that of the bare executor loop on the same batch.

    python benchmarks/pipeline.py [--concurrency 16] [--input 256] [--output 128] [--rounds 15] [--stream]

The bare loop runs in one process that does nothing else: prompts in chunks of `chunk_tokens`, then one step for each
output token of the whole batch, tokens fed back inside the executor. The node serves the same number of requests of the
same lengths over HTTP. Rounds alternate; prompts are new in each, so that no prefix is reused.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = ROOT / "topology" / "smollm2.toml"
PAGE_SIZE, CHUNK_TOKENS, VOCABULARY = 16, 512, 49_152
Prompts = np.ndarray[tuple[int, int], np.dtype[np.int32]]


def bare_loop(options: argparse.Namespace) -> None:
    """Child process: reads a seed a line, prints the seconds that the batch took."""
    import torch

    from llm_runtime.actors.messages import SAMPLE, NewRequest, SamplingParams, Step
    from llm_runtime.actors.rank.config import RankConfig
    from llm_runtime.actors.rank.executor import build_executor
    from llm_runtime.runtime.models import resolve_model

    count, length, output = options.concurrency, options.input, options.output
    pages_each = -(-(length + output) // PAGE_SIZE)
    torch.set_num_threads(os.cpu_count() or 1)
    config = RankConfig(
        model=str(resolve_model("smollm2-135m-instruct", ROOT).path),
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        num_pages=count * pages_each,
        max_slots=count,
        max_model_len=pages_each * PAGE_SIZE,
        page_size=PAGE_SIZE,
    )
    executor = build_executor(config)
    table = np.arange(count * pages_each, dtype=np.int32).reshape(count, pages_each)
    sampling = SamplingParams(max_tokens=output, seed=0, temperature=0.0)
    per_step = max(1, CHUNK_TOKENS // length)

    def packed(*values: int) -> bytes:
        return np.array(values, np.int32).tobytes()

    def steps(prompts: Prompts) -> list[Step]:
        made = []
        for first in range(0, count, per_step):
            slots = range(first, min(first + per_step, count))
            pages = [(slot, index, page) for slot in slots for index, page in enumerate(table[slot].tolist())]
            opens = [NewRequest(slot, length, sampling) for slot in slots]
            n = len(slots)
            made.append(
                Step(
                    len(made) + 1,
                    packed(*slots),
                    packed(*[0] * n),
                    packed(*[length] * n),
                    bytes([SAMPLE] * n),
                    prompts[first : first + per_step].tobytes(),
                    np.array(pages, np.int32).tobytes(),
                    opens,
                )
            )
        everyone, ones = packed(*range(count)), packed(*[1] * count)
        for position in range(length, length + output - 1):
            starts, tokens = packed(*[position] * count), packed(*[-1] * count)
            made.append(Step(len(made) + 1, everyone, starts, ones, bytes([SAMPLE] * count), tokens))
        return made

    for line in sys.stdin:
        todo = steps(make_prompts(int(line), options))
        started = time.perf_counter()
        for step in todo:
            executor.execute(step)
        print(time.perf_counter() - started, flush=True)


def make_prompts(seed: int, options: argparse.Namespace) -> Prompts:
    """Random token ids [concurrency, input]."""
    shape = (options.concurrency, options.input)
    return np.random.default_rng(seed).integers(100, VOCABULARY, shape, dtype=np.int32)


async def serve_batch(url: str, seed: int, options: argparse.Namespace) -> float:
    """Seconds that the node takes for the batch."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(prompt: list[int]) -> None:
            body = {
                "model": "smollm2-135m-instruct",
                "prompt": prompt,
                "max_tokens": options.output,
                "temperature": 0,
                "ignore_eos": True,
                "stream": options.stream,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                async for _ in response.content.iter_any():
                    pass

        started = time.perf_counter()
        await asyncio.gather(*(one(prompt) for prompt in make_prompts(seed, options).tolist()))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input", type=int, default=256, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, of which medians are shown")
    parser.add_argument("--dtype", default="int4", help="of the weights (%(default)s)")
    parser.add_argument("--kv-dtype", default="bfloat16", help="of cached keys and values (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    parser.add_argument("--port", type=int, default=8950)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_loop(options)
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    runtime = [sys.executable, "-m", "llm_runtime"]
    node = f"pipeline-{os.getpid()}"
    up = [*runtime, "up", str(TOPOLOGY), "--detach", "--port", str(options.port), "--set", f"node.name={node}"]
    # The same steps as the bare loop's: no guesses, and prompts in whole chunks.
    engine = {"chunk_tokens": CHUNK_TOKENS, "max_step_ms": 0, "speculation": "off", "kv_dtype": options.kv_dtype}
    up += ["--set", f"model.dtype={options.dtype}"]
    for key, value in engine.items():
        up += ["--set", f"engine.main.{key}={value}"]
    subprocess.run(up, check=True, env=environment, stdout=subprocess.DEVNULL)
    bare = subprocess.Popen(
        [sys.executable, "-P", __file__, "--bare", *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert bare.stdin is not None
    assert bare.stdout is not None
    times: dict[str, list[float]] = {"bare executor loop": [], "node": []}
    try:
        for seed in range(options.rounds + 1):
            bare.stdin.write(f"{seed}\n")
            bare.stdin.flush()
            alone = float(bare.stdout.readline())
            served = asyncio.run(serve_batch(f"http://127.0.0.1:{options.port}", seed, options))
            if seed:  # the first round warms both up
                times["bare executor loop"].append(alone)
                times["node"].append(served)
    finally:
        bare.stdin.close()
        bare.wait(30)
        subprocess.run([*runtime, "down", "--node", node], env=environment, stdout=subprocess.DEVNULL)
    tokens = options.concurrency * options.output
    print(f"{options.concurrency} requests, {options.input} in, {options.output} out, {options.dtype}")
    print(f"{'':24}{'seconds':>10}{'output tok/s':>14}")
    for name, seconds in times.items():
        print(f"{name:24}{median(seconds):10.2f}{tokens / median(seconds):14.1f}")
    ratios = [alone / served for alone, served in zip(*times.values(), strict=True)]
    print(f"{'node / bare':24}{'':10}{median(ratios):14.3f}")


if __name__ == "__main__":
    main()
