"""`runtime chaos`: kill processes at random under load, and check that clients lose nothing."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from llm_runtime.runtime.api_keys import key_from
from llm_runtime.runtime.chaos.inject import Plan, read_schedule
from llm_runtime.runtime.chaos.report import figures, show
from llm_runtime.runtime.chaos.run import Load, run_chaos
from llm_runtime.runtime.cli.options import add_node, topology_of
from llm_runtime.runtime.cli.output import complain, say
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import base_directory, find_node

_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="start this topology, and stop it afterwards"
    )
    add_node(parser)
    parser.add_argument("--port", type=int, metavar="N", help="with FILE: port of the HTTP server")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with FILE: replace a key of the topology"
    )
    parser.add_argument("--every", type=_seconds, default=1.0, metavar="T", help="mean time between faults (1s)")
    parser.add_argument("--for", dest="duration", type=_seconds, metavar="T", help="how long (60s, unless --kills)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="how many faults")
    parser.add_argument(
        "--signals", type=_signals, default=[signal.SIGKILL], metavar="A,B", help="KILL,SEGV,ABRT,STOP …"
    )
    parser.add_argument(
        "--actors", default="", metavar="A,B", help="names or roles, * allowed; all but the ingress by default"
    )
    parser.add_argument("--double", action="store_true", help="hit twice within 50 ms each time")
    parser.add_argument(
        "--schedule", type=Path, metavar="FILE", help="lines of SECONDS ACTOR SIGNAL, in place of chance"
    )
    parser.add_argument(
        "--controls",
        type=int,
        default=10,
        metavar="N",
        help="rounds without a fault first, for comparison (%(default)s)",
    )
    parser.add_argument("--rolling", action="store_true", help="a rolling restart, in place of signals")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="of each answer (%(default)s)")
    parser.add_argument(
        "--long-prompt", type=int, default=700, metavar="N", help="words of the longest prompt (%(default)s)"
    )
    parser.add_argument(
        "--fill", type=int, default=0, metavar="N", help="bursts of N requests more, to fill the KV pool"
    )
    parser.add_argument("--timeout", type=_seconds, default=300.0, metavar="T", help="for one request (300s)")
    parser.add_argument("--drop-rate", type=float, metavar="P", help="with FILE: part of all messages that gets lost")
    parser.add_argument("--delay", type=_seconds, metavar="T", help="with FILE: one message in 20 is late by up to T")
    parser.add_argument("--api-key", help="by default $RUNTIME_API_KEY")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = (
        "examples:\n"
        "  runtime chaos --every 1s --for 60s\n"
        "  runtime chaos topology/smollm2.toml --set model.deterministic=true --kills 100 --double\n"
        "The exit status is 0 if no request failed and no token was lost, repeated or (deterministic) changed."
    )


def run(options: argparse.Namespace) -> int:
    plan = Plan(
        every_s=options.every,
        duration_s=options.duration if options.duration is not None else 0.0 if options.kills else 60.0,
        kills=options.kills,
        signals=options.signals,
        actors=[each for each in options.actors.split(",") if each],
        double=options.double,
        seed=options.seed,
        schedule=read_schedule(options.schedule) if options.schedule else [],
        rolling=options.rolling,
        controls=options.controls,
    )
    load = Load(
        streams=options.streams,
        tokens=options.tokens,
        long_words=options.long_prompt,
        fill=options.fill,
        timeout_s=options.timeout,
        seed=options.seed,
    )
    api_key = options.api_key or key_from("RUNTIME_API_KEY")
    with _node(options) as run_dir:
        outcome = asyncio.run(run_chaos(run_dir, load, plan, api_key, lambda text: complain(f"{text} …")))
    if options.json:
        say(json.dumps(figures(outcome)))
    else:
        show(outcome, Console(highlight=False))
    return 0 if outcome.ok else 1


@contextlib.contextmanager
def _node(options: argparse.Namespace) -> Iterator[Path]:
    """The run directory of the running node, or of one that is started for this."""
    if options.file is None:
        if options.port is not None or options.set or options.drop_rate or options.delay:
            raise UserError(
                "--port, --set, --drop-rate and --delay are for a node that is started: give a topology FILE"
            )
        yield find_node(options.node)
        return
    if options.node is not None:
        raise UserError("give either a topology FILE or --node, not both")
    settings = list(options.set)
    if options.drop_rate:
        settings.append(f"faults.drop_rate={options.drop_rate}")
    if options.delay:
        settings += ["faults.delay_rate=0.05", f"faults.delay_s={options.delay}"]
    options.set = [*settings, f"faults.seed={options.seed}"] if options.drop_rate or options.delay else settings
    options.log_level = None
    name = _name_of(options)
    command = [sys.executable, "-m", "llm_runtime", "up", str(options.file), "--detach"]
    command += [] if options.port is None else ["--port", str(options.port)]
    for setting in options.set:
        command += ["--set", setting]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{options.file} cannot be started; see above")
    try:
        yield base_directory() / name
    finally:
        subprocess.run(
            [sys.executable, "-m", "llm_runtime", "down", "--node", name], stdout=subprocess.PIPE, check=False
        )


def _name_of(options: argparse.Namespace) -> str:
    from llm_runtime.runtime.plan import plan_node

    return plan_node(topology_of(options)).name


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 1s, 250ms or 5m")
    return float(match[1]) * _UNITS[match[2]]


def _signals(text: str) -> list[signal.Signals]:
    try:
        return [signal.Signals[f"SIG{name.strip().upper().removeprefix('SIG')}"] for name in text.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"there is no signal {error.args[0]}; give names such as KILL,SEGV") from None
