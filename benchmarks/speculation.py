"""Speculation on and off: tokens a second of two nodes on the same machine, and how many guesses were right.

    python benchmarks/speculation.py [--concurrency 1 8] [--output 128] [--rounds 3] [--set model.dtype=bfloat16 …]

Rounds of the two nodes alternate; prompts are new in each round, so that no prefix is reused. What is asked for:

    noise     text of random tokens, drawn at temperature 1: nothing repeats, so this is what speculation costs
    prose     an open question, greedy
    repeat    a text of random words, to be written again
    edit      a function of made-up names, to be written again with one name changed
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = ROOT / "topology" / "smollm2.toml"
VOCABULARY = 49_152
WORDS = (
    *("river", "stone", "window", "letter", "market", "garden", "engine", "winter", "silver", "paper", "bridge"),
    *("island", "music", "shadow", "forest", "ladder", "candle", "basket", "mirror", "harbor", "copper", "button"),
)
TOPICS = (
    "the sea",
    "bread",
    "railways",
    "memory",
    "glass",
    "maps",
    "winter",
    "clocks",
    "salt",
    "bees",
    "paper",
    "rain",
)
METRICS_INTERVAL_S = 1.2


def noise(draw: random.Random) -> dict[str, Any]:
    return {"prompt": [draw.randrange(100, VOCABULARY) for _ in range(128)], "temperature": 1.0}


def prose(draw: random.Random) -> dict[str, Any]:
    question = f"Question {draw.randrange(10**6)}. Write a long essay on {draw.choice(TOPICS)}.\n\nEssay:\n"
    return {"prompt": question, "temperature": 0.0}


def repeat(draw: random.Random) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=140))
    return {"prompt": f"Text:\n{text}\n\nThe same text again:\n{text[:40]}", "temperature": 0.0}


def edit(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(WORDS, 12)
    lines = [f"    {a}_{b} = compute_{b}({a}, {draw.randrange(100)})" for a, b in pairwise(names)]
    code = f"def update({', '.join(names[:4])}):\n" + "\n".join(lines) + f"\n    return {names[-1]}\n"
    prompt = f"Rename the function `update` to `refresh`. Before:\n\n```python\n{code}```\n\nAfter:\n\n```python\ndef"
    return {"prompt": prompt, "temperature": 0.0}


CASES = {"noise": noise, "prose": prose, "repeat": repeat, "edit": edit}


class Node:
    """A node with speculation on or off."""

    def __init__(self, speculation: str, port: int, settings: list[str]) -> None:
        self.name = f"speculation-{speculation}-{os.getpid()}"
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["up", str(TOPOLOGY), "--detach", "--port", str(port)]
        for setting in (f"node.name={self.name}", f"engine.main.speculation={speculation}", *settings):
            arguments += ["--set", setting]
        self.runtime(*arguments)

    def runtime(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "llm_runtime", *arguments]
        subprocess.run(
            command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL
        )

    def down(self) -> None:
        self.runtime("down", "--node", self.name)


async def tokens_per_second(session: aiohttp.ClientSession, node: Node, bodies: list[dict[str, Any]]) -> float:
    """Output tokens a second of requests that are sent together."""

    async def one(body: dict[str, Any]) -> None:
        async with session.post(f"{node.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            await response.read()

    started = time.perf_counter()
    await asyncio.gather(*map(one, bodies))
    return sum(int(body["max_tokens"]) for body in bodies) / (time.perf_counter() - started)


async def guesses(session: aiohttp.ClientSession, node: Node) -> tuple[float, float, float]:
    """Rows with guesses, guesses, and right ones, since the node's start."""
    await asyncio.sleep(METRICS_INTERVAL_S)
    async with session.get(f"{node.url}/metrics") as response:
        text = await response.text()

    def figure(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^runtime:actor_{name}{{.*}} (\S+)$", text, re.MULTILINE))

    return figure("spec_drafts"), figure("spec_draft_tokens"), figure("spec_accepted_tokens")


async def compare(off: Node, on: Node, options: argparse.Namespace) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(*(tokens_per_second(session, node, [_body(noise, 0, options)]) for node in (off, on)))
        print("| text | c | off tok/s | on tok/s | on / off | guesses right | tokens a verified row |")
        print("|---|---|---|---|---|---|---|")
        for name in options.cases:
            for concurrency in options.concurrency:
                speeds: dict[Node, list[float]] = {off: [], on: []}
                before = await guesses(session, on)
                for number in range(options.rounds):
                    for node in (off, on) if number % 2 == 0 else (on, off):
                        draw = random.Random(f"{name} {concurrency} {number}")
                        bodies = [_body(CASES[name], draw.randrange(2**31), options) for _ in range(concurrency)]
                        speeds[node].append(await tokens_per_second(session, node, bodies))
                after = await guesses(session, on)
                rows, drafted, right = (late - early for early, late in zip(before, after, strict=True))
                rate = f"{right / drafted:.0%} of {drafted:.0f}" if drafted else "none made"
                length = f"{1 + right / rows:.1f}" if rows else ""
                ratio = median(a / b for a, b in zip(speeds[on], speeds[off], strict=True))
                figures = f"{median(speeds[off]):.1f} | {median(speeds[on]):.1f} | {ratio:.2f}"
                print(f"| {name} | {concurrency} | {figures} | {rate} | {length} |", flush=True)


def _body(case: Any, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    common = {"model": "smollm2-135m-instruct", "max_tokens": options.output, "ignore_eos": True, "seed": seed}
    return common | case(random.Random(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are shown")
    parser.add_argument("--port", type=int, default=8960, help="of the first node; the second has the next one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of both topologies")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes are stopped
    off = Node("off", options.port, options.set)
    try:
        on = Node("ngram", options.port + 1, options.set)
        try:
            asyncio.run(compare(off, on, options))
        finally:
            on.down()
    finally:
        off.down()


if __name__ == "__main__":
    main()
