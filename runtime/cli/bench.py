"""`runtime bench`: latency and throughput, of a server or of the bare executor."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING

from llm_runtime.runtime.api_keys import key_from
from llm_runtime.runtime.cli.options import add_topology, topology_of
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.plan import plan_node

if TYPE_CHECKING:
    from llm_runtime.runtime.bench.executor import Timing


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    _configure_serving(kinds.add_parser("serving", help="load on a running OpenAI-compatible server"))
    _configure_offline(kinds.add_parser("offline", help="throughput of the bare executor over many requests"))
    _configure_one_batch(kinds.add_parser("one-batch", help="prefill and decode times of one batch, bare executor"))
    parser.epilog = (
        "examples:\n"
        "  runtime bench serving --url http://127.0.0.1:8000/v1 --requests 64 --concurrency 16\n"
        "  runtime bench one-batch topology/smollm2.toml --batch 16"
    )


def run(options: argparse.Namespace) -> int:
    figures: dict[str, float] = options.measure(options)
    if options.json:
        say(json.dumps(figures))
    else:
        for name, value in figures.items():
            say(f"{name:<20} {value:>12,.2f}")
    return 1 if figures.get("failed") else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _configure_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where the API starts (%(default)s)")
    parser.add_argument("--model", help="by default the first one that the server names")
    parser.add_argument("--api-key", help="sent as a bearer token; by default $RUNTIME_API_KEY")
    parser.add_argument("--requests", type=_positive, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--concurrency", type=_positive, default=16, metavar="N", help="requests at a time (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.0, metavar="R", help="requests a second; 0 for no pause (0)")
    parser.add_argument("--input-len", type=_positive, default=256, metavar="N", help="words of a prompt (%(default)s)")
    parser.add_argument(
        "--output-len", type=_positive, default=128, metavar="N", help="tokens of an answer (%(default)s)"
    )
    parser.add_argument("--prompt", default="", help="the same prompt every time, in place of passages")
    parser.add_argument("--seed", type=int, default=0, help="which passages are taken (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = "example: runtime bench serving --requests 200 --concurrency 32 --input-len 256 --output-len 128"
    parser.set_defaults(measure=_serving)


def _serving(options: argparse.Namespace) -> dict[str, float]:
    from llm_runtime.runtime.bench.figures import summary
    from llm_runtime.runtime.bench.serving import Load, run_load

    load = Load(
        requests=options.requests,
        concurrency=options.concurrency,
        input_words=options.input_len,
        output_tokens=options.output_len,
        rate=options.rate,
        seed=options.seed,
        prompt=options.prompt,
    )
    key = options.api_key or key_from("RUNTIME_API_KEY")
    outcomes, duration_s = asyncio.run(run_load(options.url.rstrip("/"), options.model, key, load))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if len(errors) == len(outcomes):
        raise UserError(f"every request failed; the first one with {errors[0]}")
    return summary(outcomes, duration_s)


def _configure_executor(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.add_argument(
        "--input-len", type=_positive, default=256, metavar="N", help="tokens of a prompt (%(default)s)"
    )
    parser.add_argument(
        "--output-len", type=_positive, default=128, metavar="N", help="tokens of an answer (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _configure_offline(parser: argparse.ArgumentParser) -> None:
    _configure_executor(parser)
    parser.add_argument("--requests", type=_positive, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--batch", type=_positive, default=16, metavar="N", help="requests at a time (%(default)s)")
    parser.epilog = "example: runtime bench offline topology/smollm2.toml --requests 64 --batch 16"
    parser.set_defaults(measure=_offline)


def _configure_one_batch(parser: argparse.ArgumentParser) -> None:
    _configure_executor(parser)
    parser.add_argument("--batch", type=_positive, default=16, metavar="N", help="requests of the batch (%(default)s)")
    parser.epilog = "example: runtime bench one-batch topology/smollm2.toml --batch 16 --set model.dtype=bfloat16"
    parser.set_defaults(measure=_one_batch)


def _offline(options: argparse.Namespace) -> dict[str, float]:
    timings = _run_executor(options, options.requests)
    duration_s = sum(timing.duration_s for timing in timings)
    return {
        "requests": options.requests,
        "steps": len(timings),
        "duration_s": duration_s,
        "requests_per_s": options.requests / duration_s,
        "input_tokens_per_s": options.requests * options.input_len / duration_s,
        "output_tokens_per_s": options.requests * options.output_len / duration_s,
    }


def _one_batch(options: argparse.Namespace) -> dict[str, float]:
    from llm_runtime.runtime.bench.figures import percentile

    timings = _run_executor(options, options.batch)
    prefill_s = sum(timing.duration_s for timing in timings if timing.prefilled)
    decodes = [timing for timing in timings if not timing.prefilled]
    steps_ms = [1000 * timing.duration_s for timing in decodes]
    decode_s = sum(timing.duration_s for timing in decodes)
    return {
        "batch": options.batch,
        "prefill_ms": 1000 * prefill_s,
        "prefill_tokens_per_s": sum(timing.prefilled for timing in timings) / prefill_s,
        "decode_step_p50_ms": percentile(steps_ms, 50),
        "decode_step_p99_ms": percentile(steps_ms, 99),
        "decode_tokens_per_s": sum(timing.decoded for timing in decodes) / decode_s if decode_s else float("nan"),
    }


def _run_executor(options: argparse.Namespace, requests: int) -> list[Timing]:
    from llm_runtime.runtime.bench.executor import Batch, executor_for, run_batch

    loaded = topology_of(options)
    if len(loaded.topology.models) > 1:
        raise UserError(f"{loaded.file} serves several models, and this is a benchmark of one: give a file with one")
    plan = plan_node(loaded)
    if not plan.engines:
        raise UserError(
            f"{plan.models[0].served_name} does not generate text, and this is a benchmark of models that do"
        )
    batch = Batch(
        requests=requests,
        slots=min(options.batch, requests),
        input_tokens=options.input_len,
        output_tokens=options.output_len,
        chunk_tokens=plan.engines[0].settings.chunk_tokens,
        seed=options.seed,
    )
    return run_batch(executor_for(plan, batch), batch)
