"""Structured output of the embedded model: whether it is valid, and what it costs.

    python benchmarks/structured.py valid                # ten samples at temperature 1 of each of twenty schemas
    python benchmarks/structured.py speed                # time per token with a schema and without, at concurrency 8
    python benchmarks/structured.py mask                 # where the time of a mask goes, in this process
    python benchmarks/structured.py maskbench DIRECTORY  # instances of MaskBench (guidance-ai/jsonschemabench)

`valid` asks as applications do: a question, the schema, and room for the answer. A sample counts if the answer ends by
itself, is JSON, and the schema allows it. Exit status 1 if one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import numpy as np
from nodes import running

from llm_runtime.actors.grammar import Backend, BadGrammar, Matcher, Tokens, load_backend
from llm_runtime.actors.grammar.backends.llguidance import LLGuidance
from llm_runtime.actors.messages import Constraint
from llm_runtime.actors.vocabulary import Vocabulary
from llm_runtime.runtime.models import resolve_model

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

    from llm_runtime import kernels

    backend = _backend(options)
    words = -(-backend.tokens.vocab_size // 32)
    logits = torch.randn(options.streams, backend.tokens.vocab_size)
    seeds = torch.zeros(2, options.streams, dtype=torch.int64)
    draw = np.random.default_rng(0)
    for name, schema in SCHEMAS.items():
        compiled = backend.compile(Constraint("json_schema", json.dumps(schema)))
        matchers = [compiled.matcher(backend.tokens.ends) for _ in range(options.streams)]
        spent, steps = np.zeros(2), 0
        while steps < 100 and matchers:
            bits = np.zeros((len(matchers), words), np.int32)
            params = kernels.SamplingTensors.build([1.0] * len(matchers))
            began = time.perf_counter()
            backend.fill(matchers, bits, list(range(len(matchers))))
            filled = time.perf_counter()
            places = torch.arange(len(matchers), dtype=torch.int32)
            masks = kernels.TokenMasks(places, torch.from_numpy(bits))
            kernels.sample(logits[: len(matchers)], params, *seeds[:, : len(matchers)], masks)
            spent += filled - began, time.perf_counter() - filled
            steps += 1
            allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=backend.tokens.vocab_size, bitorder="little")
            for matcher, row in zip(matchers, allowed, strict=True):
                matcher.accept(int(draw.choice(np.flatnonzero(row))))
            matchers = [each for each in matchers if not each.over]
        fill, draw_from = 1e6 * spent / steps
        print(f"{name}: fill {fill:.0f} µs, sample {draw_from:.0f} µs a step, {steps} steps")
    return 0


def maskbench(options: argparse.Namespace) -> int:
    """Schemas and instances of MaskBench: what is refused, what is wrong, and what compiling and masks cost in time by
    the clock and of a processor."""
    backend = _backend(options)
    files = sorted(Path(options.data).glob("*.json"))[:: options.every]
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    compiling: list[tuple[float, float]] = []
    filling: list[tuple[float, float]] = []
    bits = np.zeros(-(-backend.tokens.vocab_size // 32), np.int32)
    for file in files:
        document = json.loads(file.read_text())
        counts["schemas"] += 1
        began = _times()
        try:
            compiled = backend.compile(Constraint("json_schema", json.dumps(document["schema"])))
        except BadGrammar as refusal:
            counts["refused for a keyword" if "supported" in str(refusal) else "refused otherwise"] += 1
            reasons[str(refusal)[:110]] += 1
            continue
        finally:
            compiling.append(_since(began))
        for number, test in enumerate(document["tests"]):
            text = json.dumps(test["data"], ensure_ascii=False)
            matcher = compiled.matcher(backend.tokens.ends)
            right = True
            for token in backend.tokens.spell(text.encode("utf-8", "surrogatepass")):
                if not number:
                    began = _times()
                    matcher.fill(bits)
                    filling.append(_since(began))
                if not matcher.accept(token):
                    right = False
                    break
            right = right and matcher.complete
            counts["valid instances" if test["valid"] else "invalid instances"] += 1
            if test["valid"] and not right and _in_some_order(compiled.matcher(backend.tokens.ends), backend, test):
                counts["right in the schema's order"] += 1
                continue
            if right != test["valid"]:
                counts["wrong accepted" if right else "right refused"] += 1
                print(f"{'accepted' if right else 'refused'}: {file.name}: {text[:200]}")
    for reason, count in reasons.most_common(40):
        print(f"{count:5} {reason}")
    print(dict(counts))
    for name, times in (("compile", compiling), ("mask", filling)):
        for kind, column in zip(("by the clock", "of a processor"), zip(*times, strict=True), strict=True):
            p50, p99, most = (1e3 * float(np.percentile(column, rank)) for rank in (50, 99, 100))
            print(f"{name}: p50 {p50:.3f} ms, p99 {p99:.2f} ms, at most {most:.1f} ms {kind}")
    return 1 if counts["wrong accepted"] else 0


def _times() -> tuple[float, float]:
    """Seconds by the clock, and of a processor that this thread had."""
    return time.perf_counter(), time.thread_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    clock, processor = _times()
    return clock - began[0], processor - began[1]


def _in_some_order(matcher: Matcher, backend: Backend, test: Any) -> bool:
    """Whether an instance is accepted if its properties come in another order. llguidance fixes their order, and
    MaskBench's instances are put into it (its creation/reorder.py), but for schemas that plain llguidance refuses."""

    tries = 20_000

    def accepted(text: str) -> int:
        """Tokens accepted, or -1, and nothing is."""
        spelled = backend.tokens.spell(text.encode("utf-8", "surrogatepass"))
        for count, token in enumerate(spelled):
            if not matcher.accept(token):
                matcher.rollback(count)
                return -1
        return len(spelled)

    def sequence(opening: str, parts: Sequence[tuple[str, Any]], closing: str, free: bool) -> int:
        taken = accepted(opening)
        count = rest(parts, closing, free) if taken >= 0 else -1
        if count < 0:
            matcher.rollback(max(taken, 0))
        return taken + count if count >= 0 else -1

    def rest(parts: Sequence[tuple[str, Any]], closing: str, free: bool, comma: str = "") -> int:
        nonlocal tries
        if not parts:
            return accepted(closing)
        for at, (before, data) in enumerate(parts if free else parts[:1]):
            tries -= 1
            taken = accepted(comma + before) if tries > 0 else -1
            if taken < 0:
                continue
            count = value(data)
            others = rest([*parts[:at], *parts[at + 1 :]], closing, free, ", ") if count >= 0 else -1
            if others >= 0:
                return taken + count + others
            matcher.rollback(taken + max(count, 0))
        return -1

    def value(data: Any) -> int:
        if isinstance(data, dict):
            members = [(json.dumps(key, ensure_ascii=False) + ": ", each) for key, each in data.items()]
            return sequence("{", members, "}", free=True)
        if isinstance(data, list):
            return sequence("[", [("", each) for each in data], "]", free=False)
        return accepted(json.dumps(data, ensure_ascii=False))

    return value(test["data"]) >= 0 and matcher.complete


def _backend(options: argparse.Namespace) -> Backend:
    """For the embedded model, or for a vocabulary in the form of tekken.json (Mistral's, of 131k tokens)."""
    if not options.tekken:
        return load_backend(resolve_model(MODEL, ROOT).path, 49152, options.backend)
    document = json.loads(Path(options.tekken).read_text())
    special = int(document["config"]["default_num_special_tokens"])
    size = int(document["config"]["default_vocab_size"])
    texts = [base64.b64decode(each["token_bytes"]) for each in document["vocab"][: size - special]]
    no_tokenizer: Any = None
    vocabulary = Vocabulary(
        token_bytes=[b""] * special + texts,
        special_ids=range(special),
        bos_id=1,
        eos_ids=[2],
        strips_leading_space=False,
        special_tokens={},
        chat_templates={},
        build_tokenizer=no_tokenizer,
    )
    return LLGuidance(Tokens(vocabulary, size), options.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["valid", "speed", "mask", "maskbench"])
    parser.add_argument("data", nargs="?", help="of maskbench: the directory maskbench/data of its repository")
    parser.add_argument("--every", type=int, default=8, help="of maskbench: takes one schema in so many (%(default)s)")
    parser.add_argument("--backend", choices=["llguidance", "xgrammar"], default="llguidance")
    parser.add_argument("--tekken", metavar="FILE", help="of mask and maskbench: another vocabulary, as in tekken.json")
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
    if options.part == "maskbench" and not options.data:
        parser.error("maskbench needs the directory of its data")
    parts = {"valid": valid, "speed": speed, "mask": mask, "maskbench": maskbench}
    return parts[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
