"""What prefill and decode apart are worth: how evenly streams flow while long prompts arrive, and what it costs.

    python benchmarks/disaggregation.py [--seconds 30] [--rate 1] [--prompt 2000] [--rounds 3]

Interference: streams decode while prompts arrive at a steady rate, on one engine with all cores (with and without
chunked prefill) and on a prefill and a decode engine with one core each. TTFT: a prompt alone, on one engine with
one core and on the two. All in turn on one machine, in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from statistics import median

import aiohttp
from nodes import running
from rich.console import Console
from rich.table import Table

from llm_runtime.runtime.bench.figures import percentile
from llm_runtime.runtime.bench.serving import Load, run_load

NAME = "disaggregation-benchmark"
INPUT_WORDS = 64


@dataclass(frozen=True)
class Deployment:
    """A topology and its settings."""

    title: str
    topology: str
    settings: tuple[str, ...]


UNIFIED = ("engine.main.speculation=off", "engine.main.kv_tokens=32768")
APART = ("engine.decode.speculation=off", "engine.decode.kv_tokens=32768")
WHOLE_PROMPTS = ("engine.main.chunk_tokens=8192", "engine.main.max_step_ms=0")
INTERFERENCE = [
    Deployment("one engine, whole prompts", "smollm2.toml", (*UNIFIED, *WHOLE_PROMPTS)),
    Deployment("one engine, chunked", "smollm2.toml", UNIFIED),
    Deployment("prefill and decode", "pd-smollm2.toml", APART),
]
ALONE = [
    Deployment("one engine, one core", "smollm2.toml", (*UNIFIED, *WHOLE_PROMPTS, "engine.main.threads=1")),
    Deployment("prefill and decode", "pd-smollm2.toml", (*APART, "engine.prefill.chunk_tokens=8192")),
]


@dataclass
class Figures:
    """Medians over rounds are taken of these."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> float:
        return median(self.values[name])


async def interfere(url: str, options: argparse.Namespace, figures: Figures) -> None:
    """Streams that decode for a time, and prompts that arrive meanwhile, each answered with one token."""
    stop = time.perf_counter() + options.seconds
    prompts = int(options.seconds * options.rate)

    gaps: list[float] = []
    tokens = 0

    async def stream(session: aiohttp.ClientSession, number: int) -> None:
        """Streams one after the other; what passes before a stream's first token is no gap."""
        nonlocal tokens
        words = random.Random(number)
        while time.perf_counter() < stop:
            prompt = " ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=INPUT_WORDS))
            body = {"model": options.model, "prompt": prompt, "max_tokens": 2000, "stream": True}
            before: float | None = None
            async with session.post(f"{url}/completions", json=body | {"temperature": 0, "ignore_eos": True}) as answer:
                async for line in answer.content:
                    now = time.perf_counter()
                    if now >= stop:
                        return
                    if line.startswith(b"data: {"):
                        tokens += 1
                        if before is not None:
                            gaps.append(1000 * (now - before))
                        before = now

    async def streams() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(stream(session, number) for number in range(options.streams)))

    async def load() -> list[float]:
        outcomes, _ = await run_load(
            url, options.model, None, Load(prompts, prompts, options.prompt, 1, rate=options.rate, seed=options.seed)
        )
        return [outcome.ttft for outcome in outcomes if not outcome.error]

    _, ttfts = await asyncio.gather(streams(), load())
    figures.add(
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        itl_max=max(gaps),
        tokens=tokens / options.seconds,
        ttft=1000 * median(ttfts),
        answered=len(ttfts),
    )


async def prompt_alone(url: str, options: argparse.Namespace, figures: Figures, seed: int) -> None:
    """Prompts one after the other, each answered with one token."""
    outcomes, _ = await run_load(url, options.model, None, Load(6, 1, options.alone, 1, seed=seed))
    figures.add(ttft=1000 * median(outcome.ttft for outcome in outcomes[1:]))


def measure(options: argparse.Namespace) -> None:
    """Prints both tables."""
    console = Console(highlight=False)
    url = f"http://127.0.0.1:{options.port}/v1"
    mixed = {deployment.title: Figures() for deployment in INTERFERENCE}
    alone = {deployment.title: Figures() for deployment in ALONE}
    for number in range(options.rounds):
        for deployment in INTERFERENCE:
            with running(NAME, options.port, deployment.topology, *deployment.settings, *options.set):
                asyncio.run(interfere(url, options, mixed[deployment.title]))
        for deployment in ALONE:
            with running(NAME, options.port, deployment.topology, *deployment.settings, *options.set):
                asyncio.run(prompt_alone(url, options, alone[deployment.title], number))

    title = f"{options.streams} streams, prompts of {options.prompt} words at {options.rate:g}/s, {options.seconds} s"
    table = Table("", "ITL p50 ms", "p99", "max", "tokens/s", "prompts' TTFT ms", "prompts", title=title)
    for name, each in mixed.items():
        columns = ("itl_p50", "itl_p99", "itl_max", "tokens", "ttft", "answered")
        table.add_row(name, *(f"{each[column]:.1f}" for column in columns))
    console.print(table)
    whole, apart = mixed["one engine, whole prompts"], mixed["prefill and decode"]
    console.print(
        f"ITL p99 of prefill and decode / one engine with whole prompts: {apart['itl_p99'] / whole['itl_p99']:.2f}"
    )
    one, two = alone["one engine, one core"]["ttft"], alone["prefill and decode"]["ttft"]
    console.print(
        f"TTFT of a prompt of {options.alone} words alone, one core: {one:.1f} ms on one engine, {two:.1f} ms on two: "
        f"{100 * (two / one - 1):+.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1.0, help="prompts a second")
    parser.add_argument("--prompt", type=int, default=2000, help="words of each")
    parser.add_argument("--alone", type=int, default=1000, help="words of the prompts that come alone")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--port", type=int, default=8970)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `runtime up`")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
