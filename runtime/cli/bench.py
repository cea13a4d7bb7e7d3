"""`runtime bench`: latency and throughput, of a server or of the bare executor."""

from __future__ import annotations

import argparse
import asyncio
import json

from runtime.cli.output import say
from runtime.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    _configure_serving(kinds.add_parser("serving", help="load on a running OpenAI-compatible server"))
    parser.epilog = "example: runtime bench serving --url http://127.0.0.1:8000/v1 --requests 64 --concurrency 16"


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
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--requests", type=_positive, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--concurrency", type=_positive, default=16, metavar="N", help="requests at a time (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.0, metavar="R", help="requests a second; 0 for no pause (0)")
    parser.add_argument("--input-len", type=_positive, default=256, metavar="N", help="words of a prompt (%(default)s)")
    parser.add_argument(
        "--output-len", type=_positive, default=128, metavar="N", help="tokens of an answer (%(default)s)"
    )
    parser.add_argument("--prompt", default="", help="the same prompt every time, in place of random words")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = "example: runtime bench serving --requests 200 --concurrency 32 --input-len 256 --output-len 128"
    parser.set_defaults(measure=_serving)


def _serving(options: argparse.Namespace) -> dict[str, float]:
    from runtime.bench.figures import summary
    from runtime.bench.serving import Load, run_load

    load = Load(
        requests=options.requests,
        concurrency=options.concurrency,
        input_words=options.input_len,
        output_tokens=options.output_len,
        rate=options.rate,
        seed=options.seed,
        prompt=options.prompt,
    )
    outcomes, duration_s = asyncio.run(run_load(options.url.rstrip("/"), options.model, options.api_key, load))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if len(errors) == len(outcomes):
        raise UserError(f"every request failed; the first one with {errors[0]}")
    return summary(outcomes, duration_s)
