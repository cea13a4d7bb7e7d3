"""This runtime beside vLLM and llama.cpp: one machine, one run, one client, rounds in turn.

    python benchmarks/serving.py [--vllm BIN --vllm-model DIR] [--llama-server BIN] [--base DIR]
                                 [--also NAME:KEY=VALUE,…] [--prompts random] [--temperature 0] [--quick]

Peers are left out where they are not found (also looked for in $VLLM, $VLLM_MODEL and $LLAMA_SERVER; `peers.py` makes
the directory for vLLM). All serve SmolLM2-135M-Instruct: vLLM in bfloat16, llama.cpp the GGUF file as it is, this
runtime as the topology says. In each round every server gets the same prompts, which no server has seen before, as
token ids: passages of natural text (prose, this repository's documentation, Python's language reference), answered at
temperature 0.8 unless said otherwise. Random tokens and greedy answers soon repeat themselves, which flatters guessing.
Peers are stopped (SIGSTOP) while another one is measured. Medians over the rounds, and ratios beside the targets.

`--also` is one more row of this runtime with other settings: `bfloat16:model.dtype=bfloat16` is equal precision, and
`plain:engine.main.speculation=off` guesses nothing. `--base` is another working tree of this runtime, such as the one
before a change: nothing is to be slower.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from peers import ROOT, Server, embedded_gguf, llama_server, ours, vllm

from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.runtime.bench.figures import percentile
from llm_runtime.runtime.bench.serving import Outcome, run_prompts

FIRST_TOKEN, VOCABULARY = 100, 49_152
INPUT, OUTPUT = 256, 128
PREFIX, OWN, PREFIX_REQUESTS, PREFIX_OUTPUT = 1_000, 16, 32, 32
START_LIMIT_S = 300.0
Figures = dict[str, float]

COLUMNS: dict[str, tuple[str, float]] = {
    "ttft": ("c=1 TTFT ms", 1e3),
    "tpot": ("c=1 TPOT ms", 1e3),
    "throughput": ("c=16 tok/s", 1.0),
    "itl": ("c=16 ITL p99 ms", 1e3),
    "prefix": ("prefix s", 1.0),
    "start": ("start s", 1.0),
    "memory": ("PSS GB", 1e-9),
    "failed": ("failed", 1.0),
}
"""Figure: heading and factor."""

TARGETS: list[tuple[str, str, str, float, float | None]] = [
    ("c=1 TPOT", "tpot", "llama.cpp", 0.45, None),
    ("c=1 TTFT", "ttft", "vLLM", 0.45, 0.4),
    ("c=16 output tok/s", "throughput", "vLLM", 3.0, 3.5),
    ("c=16 output tok/s", "throughput", "llama.cpp", 4.0, 6.0),
    ("c=16 ITL p99", "itl", "vLLM", 0.6, 0.5),
    ("shared prefix, total time", "prefix", "vLLM", 0.5, None),
    ("start to first token, s", "start", "", 4.0, 2.0),
    ("memory (PSS), GB", "memory", "", 1.2, 0.8),
    ("failures at c=64", "failed64", "", 0.0, 0.0),
]
"""What, figure, beside whom (nobody: the figure itself), target, stretch. Throughput is to be above, the rest below."""


@cache
def natural_text() -> list[int]:
    """Tokens of English prose, of this repository's documentation, and of Python's language reference."""
    paths = [ROOT / "runtime/bench/prose.txt", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [path.read_text() for path in paths] + [topics[name] for name in sorted(topics)]
    vocabulary = load_vocabulary(embedded_gguf())
    return [token for text in texts for token in vocabulary.encode(text, False)]


class Prompts:
    """Token ids, the same for every server, new for every round: passages of natural text, or drawn at random."""

    def __init__(self, seed: int, natural: bool) -> None:
        self._draw = np.random.default_rng(seed)
        self._text = natural_text() if natural else []

    def take(self, count: int, length: int = INPUT, prefix: Sequence[int] = ()) -> list[str | list[int]]:
        """`count` prompts of `length` tokens after the prefix."""
        if self._text:
            starts = self._draw.integers(0, len(self._text) - length, count).tolist()
            return [[*prefix, *self._text[start : start + length]] for start in starts]
        drawn = self._draw.integers(FIRST_TOKEN, VOCABULARY, (count, length)).tolist()
        return [[*prefix, *each] for each in drawn]


def send(
    server: Server, prompts: Sequence[str | list[int]], concurrency: int, output: int, temperature: float
) -> tuple[list[Outcome], float]:
    """Sends prompts; outcomes and seconds from first to last."""
    return asyncio.run(run_prompts(server.url, None, None, prompts, concurrency, output, temperature=temperature))


def measure(server: Server, seed: int, options: argparse.Namespace) -> Figures:
    """One round of one server."""
    prompts, temperature = Prompts(seed, options.prompts == "natural"), options.temperature
    send(server, prompts.take(2), 2, 8, temperature)  # warms up
    alone, _ = send(server, prompts.take(options.alone), 1, OUTPUT, temperature)
    many, many_s = send(server, prompts.take(options.many), 16, OUTPUT, temperature)
    (prefix,) = prompts.take(1, PREFIX)
    own = prompts.take(PREFIX_REQUESTS, OWN, prefix)  # type: ignore[arg-type]
    sharing, prefix_s = send(server, own, PREFIX_REQUESTS, PREFIX_OUTPUT, temperature)
    good = [[each for each in outcomes if not each.error] for outcomes in (alone, many)]
    return {
        "ttft": percentile([each.ttft for each in good[0]], 50),
        "tpot": percentile([each.tpot for each in good[0]], 50),
        "throughput": sum(each.tokens for each in good[1]) / many_s,
        "itl": percentile([gap for each in good[1] for gap in each.itl], 99),
        "prefix": prefix_s,
        "memory": server.pss_bytes(),
        "failed": sum(bool(each.error) for each in (*alone, *many, *sharing)),
    }


def crowd(server: Server, options: argparse.Namespace) -> float:
    """How many of 64 concurrent requests fail."""
    prompts = Prompts(10_000, options.prompts == "natural").take(64 if options.quick else 128)
    outcomes, _ = send(server, prompts, 64, 32 if options.quick else OUTPUT, options.temperature)
    for outcome in outcomes:
        if outcome.error:
            print(f"{server.name}: {outcome.error}")
    return float(sum(bool(outcome.error) for outcome in outcomes))


def show(figures: dict[str, Figures]) -> None:
    """Prints the table, and the ratios beside the targets."""
    print(f"\n{'':12}" + "".join(f"{heading:>17}" for heading, _ in COLUMNS.values()))
    for name, own in figures.items():
        cells = (own.get(key, float("nan")) * factor for key, (_, factor) in COLUMNS.items())
        print(f"{name:12}" + "".join(f"{cell:17.2f}" for cell in cells))
    if "base" in figures:
        ratios = (figures["runtime"].get(key, float("nan")) / (figures["base"][key] or float("nan")) for key in COLUMNS)
        print(f"{'over base':12}" + "".join(f"{ratio:17.3f}" for ratio in ratios))
    print(f"\n{'':40}{'measured':>10}{'target':>10}{'stretch':>10}")
    for what, key, peer, target, stretch in TARGETS:
        if peer and peer not in figures:
            continue
        value = figures["runtime"].get(key, float("nan"))
        value = value / figures[peer][key] if peer else value * COLUMNS.get(key, ("", 1.0))[1]
        above = key == "throughput"
        met = value >= target if above else value <= target
        label = f"{what}, over {peer}" if peer else what
        far = "" if stretch is None else f"{stretch:.2f}"
        sign = "≥" if above else "≤"
        print(f"{label:40}{value:10.2f}{sign + f' {target:.2f}':>10}{far:>10}  {'met' if met else 'MISSED'}")


def servers_of(options: argparse.Namespace, logs: Path) -> list[Server]:
    """Those that are there; a line for each that is not."""
    servers = [ours(options.port, options.set, logs / "runtime.log")]
    if options.vllm and shutil.which(options.vllm) and options.vllm_model and options.vllm_model.is_dir():
        servers.append(vllm(options.vllm, options.vllm_model, options.port + 1, logs / "vllm.log"))
    else:
        print("vLLM is left out: give --vllm BIN and --vllm-model DIR")
    if options.llama_server and shutil.which(options.llama_server):
        more = shlex.split(options.llama_args)
        servers.append(llama_server(options.llama_server, embedded_gguf(), options.port + 2, logs / "llama.log", more))
    else:
        print("llama.cpp is left out: give --llama-server BIN")
    if options.base:
        servers.append(ours(options.port + 3, options.set, logs / "base.log", options.base.resolve(), "base"))
    for number, also in enumerate(options.also):
        name, _, settings = also.partition(":")
        more = [*options.set, *filter(None, settings.split(","))]
        servers.append(ours(options.port + 4 + number, more, logs / f"{name}.log", name=name))
    return servers


def run(servers: list[Server], options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Figures]:
    """Starts all servers, one after the other, and measures them in turn; figures by name."""
    for server in list(reversed(servers)):  # this runtime last: it cannot be stopped meanwhile
        try:
            server.start(START_LIMIT_S)
        except RuntimeError as error:
            if server is servers[0]:
                raise
            say(f"{error}; it is left out")
            server.stop()
            servers = [each for each in servers if each is not server]
            continue
        say(f"{server.name}: first token after {server.start_s:.1f} s")
        idle = server.cpu_seconds()
        time.sleep(1.0)
        say(f"{server.name}: takes {100 * (server.cpu_seconds() - idle):.0f} % of a core when idle")
        server.pause()
    rounds: dict[str, list[Figures]] = {server.name: [] for server in servers}
    for number in range(options.rounds):
        turn = servers[number % len(servers) :] + servers[: number % len(servers)]
        for server in turn:
            server.resume()
            began = time.monotonic()
            rounds[server.name].append(measure(server, number, options))
            say(f"round {number + 1}: {server.name}, {time.monotonic() - began:.0f} s")
            server.pause()
    figures = {
        name: {key: median(each[key] for each in taken) for key in taken[0]}
        | {"failed": sum(each["failed"] for each in taken)}
        for name, taken in rounds.items()
    }
    for server in servers:
        figures[server.name]["start"] = server.start_s
    figures[servers[0].name]["failed64"] = crowd(servers[0], options)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=os.environ.get("VLLM"), metavar="BIN")
    parser.add_argument("--vllm-model", type=Path, default=os.environ.get("VLLM_MODEL"), metavar="DIR")
    parser.add_argument("--llama-server", default=os.environ.get("LLAMA_SERVER"), metavar="BIN")
    parser.add_argument(
        "--llama-args",
        default="",
        metavar="TEXT",
        help="more options for it, such as --no-repack where it dies of an illegal instruction for want of AMX",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="another working tree of this runtime")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME:KEY=VALUE,…", help="this runtime with other settings, too"
    )
    parser.add_argument("--prompts", choices=("natural", "random"), default="natural", help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of all answers (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the topology")
    parser.add_argument("--port", type=int, default=8970, help="and those above it")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are shown (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short round: about two minutes once all have started")
    options = parser.parse_args()
    options.alone, options.many = (2, 16) if options.quick else (4, 48)
    if options.quick:
        options.rounds = 1
    logs = Path(tempfile.mkdtemp(prefix="serving-"))
    servers = servers_of(options, logs)
    began = time.monotonic()
    try:
        figures = run(servers, options, lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True))
    except RuntimeError as error:
        sys.exit(f"{error}")
    finally:
        for server in servers:
            server.stop()
    print(f"logs: {logs}")
    show(figures)


if __name__ == "__main__":
    main()
