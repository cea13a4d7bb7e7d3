"""Structured output of the embedded model: whether it is valid, and what it costs.

    python benchmarks/structured.py valid                # ten samples at temperature 1 of each of twenty schemas
    python benchmarks/structured.py speed                # time per token with a schema and without, at concurrency 8
    python benchmarks/structured.py mask                 # where the time of a mask goes, in this process

`valid` asks as applications do: a question, the schema, and room for the answer. A sample counts if the answer ends by
itself, is JSON, and the schema allows it. Exit status 1 if one does not. The schemas bound their strings and lists:
where they are free, a model of this size now and then writes until it is cut off, here as with any other server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import numpy as np
from nodes import running

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
NAME = "structured-benchmark"
SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "schemas.json").read_text())
QUESTIONS = {
    "describe": "Describe an example, as JSON.",
    "make up": "Make up a realistic example. Answer with JSON only.",
}


async def _ask(session: aiohttp.ClientSession, url: str, schema: Any, seed: int, tokens: int) -> tuple[str, str]:
    """The answer and why it ended."""
    question = list(QUESTIONS.values())[seed % len(QUESTIONS)]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": tokens,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        document = await response.json()
        if response.status != 200:
            return document["error"]["message"], f"status {response.status}"
        choice = document["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]


def _fault(schema: Any, text: str, finish: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if finish != "stop":
        return f"ended by {finish}"
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    except json.JSONDecodeError as error:
        return f"no JSON: {error}"
    except jsonschema.ValidationError as error:
        return f"against the schema: {error.message}"
    return ""


async def _valid(url: str, options: argparse.Namespace) -> int:
    slots = asyncio.Semaphore(options.streams)
    found: list[tuple[str, int, str, str]] = []

    async def one(name: str, seed: int) -> None:
        async with slots:
            text, finish = await _ask(session, url, SCHEMAS[name], seed, options.tokens)
        fault = _fault(SCHEMAS[name], text, finish)
        found.append((name, seed, text, fault))
        if fault:
            print(f"{name}, seed {seed}: {fault}: {text[:150]} … {text[-100:]}", flush=True)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        await asyncio.gather(
            *(one(name, options.seed + sample) for name in SCHEMAS for sample in range(options.samples))
        )
    failed = [each for each in found if each[3]]
    different = Counter(name for name, _ in {(name, text) for name, _, text, _ in found})
    for name in SCHEMAS:
        right = options.samples - sum(each[0] == name for each in failed)
        longest = max(len(text) for of, _, text, _ in found if of == name)
        print(f"{name}: {right} of {options.samples} valid, {different[name]} different, up to {longest} characters")
    print(f"{len(found) - len(failed)} of {len(found)} valid")
    return 1 if failed else 0


def valid(options: argparse.Namespace) -> int:
    """Samples of every schema."""
    with running(NAME, options.port, options.topology, *options.set):
        return asyncio.run(_valid(f"http://127.0.0.1:{options.port}", options))


async def _speed(url: str, options: argparse.Namespace) -> int:
    listed = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 100}
    forms: dict[str, dict[str, Any]] = {"plain": {"ignore_eos": True}, "schema": {"guided_json": listed}}

    async def one(fields: dict[str, Any], seed: int) -> float:
        """Seconds per token after the first."""
        body = {"prompt": "Names of towns, as JSON:", "max_tokens": options.tokens, "stream": True, "seed": seed}
        arrivals: list[float] = []
        async with session.post(f"{url}/v1/completions", json={**body, "temperature": 1.0, **fields}) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    arrivals.append(time.perf_counter())
        return (arrivals[-1] - arrivals[0]) / (options.tokens - 1)

    measured: dict[str, list[float]] = {name: [] for name in forms}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        for turn in range(options.rounds + 1):  # in turn and to and fro, so that a noisy moment falls on both
            for name, fields in list(forms.items())[:: -1 if turn % 2 else 1]:
                times = await asyncio.gather(*(one(fields, 8 * turn + i) for i in range(options.streams)))
                if turn:
                    measured[name].append(float(np.median(times)))
    for name, values in measured.items():
        print(f"{name}: {1e3 * np.median(values):.2f} ms a token ({', '.join(f'{1e3 * each:.2f}' for each in values)})")
    ratios = [schema / plain for schema, plain in zip(measured["schema"], measured["plain"], strict=True)]
    print(
        f"a schema costs {100 * (np.median(ratios) - 1):+.1f} % of the time per token at concurrency {options.streams}"
    )
    return 0


def speed(options: argparse.Namespace) -> int:
    """The same load with a schema and without, in turn on one node."""
    with running(NAME, options.port, options.topology, *options.set):
        return asyncio.run(_speed(f"http://127.0.0.1:{options.port}", options))


def mask(options: argparse.Namespace) -> int:
    """What the rank does for a step of `streams` constrained slots, part by part, without the model."""
    import torch

    import kernels
    from actors.grammar import GrammarCompiler, load_tokens, xgrammar
    from actors.messages import Constraint
    from runtime.models import resolve_model

    tokens = load_tokens(resolve_model(MODEL, ROOT).path, 49152)
    words = -(-tokens.vocab_size // 32)
    compiler = GrammarCompiler(tokens)
    logits = torch.randn(options.streams, tokens.vocab_size)
    seeds = torch.zeros(2, options.streams, dtype=torch.int64)
    draw = np.random.default_rng(0)
    for name, schema in SCHEMAS.items():
        compiled = compiler.compile(Constraint("json_schema", json.dumps(schema)))
        matchers = [xgrammar().GrammarMatcher(compiled) for _ in range(options.streams)]
        batch = xgrammar().BatchGrammarMatcher(max_threads=options.threads)
        spent, steps = np.zeros(2), 0
        while steps < 100 and matchers:
            bits = np.zeros((len(matchers), words), np.int32)
            params = kernels.SamplingTensors.build([1.0] * len(matchers))
            began = time.perf_counter()
            batch.batch_fill_next_token_bitmask(matchers, bits, list(range(len(matchers))))
            filled = time.perf_counter()
            places = torch.arange(len(matchers), dtype=torch.int32)
            masks = kernels.TokenMasks(places, torch.from_numpy(bits))
            kernels.sample(logits[: len(matchers)], params, *seeds[:, : len(matchers)], masks)
            spent += filled - began, time.perf_counter() - filled
            steps += 1
            allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=tokens.vocab_size, bitorder="little")
            for matcher, row in zip(matchers, allowed, strict=True):
                matcher.accept_token(int(draw.choice(np.flatnonzero(row))))
            matchers = [each for each in matchers if not each.is_terminated()]
        fill, draw_from = 1e6 * spent / steps
        print(f"{name}: fill {fill:.0f} µs, sample {draw_from:.0f} µs a step, {steps} steps")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["valid", "speed", "mask"])
    parser.add_argument("--samples", type=int, default=10, help="of each schema (%(default)s)")
    parser.add_argument("--tokens", type=int, default=0, help="limit of an answer (valid: 1024, speed: 128)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of a mask (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8960)
    parser.add_argument("--topology", default="smollm2.toml", help="a file of topology/, or any (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the topology")
    options = parser.parse_args()
    options.tokens = options.tokens or (1024 if options.part == "valid" else 128)
    return {"valid": valid, "speed": speed, "mask": mask}[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
