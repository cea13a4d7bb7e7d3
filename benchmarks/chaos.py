"""The long form of the fault tests: hundreds of kills under load, and what clients and the machine saw of them.

    python benchmarks/chaos.py                 # all of it, on a node of its own: about half an hour on two cores
    python benchmarks/chaos.py --kills 30      # shorter
    python benchmarks/chaos.py --only kills,leaks --set model.dtype=float32

Each part starts a node of the embedded model, disturbs it, prints its tables and stops it. For comparison with the
pauses: vLLM 0.32 on a CPU ends its streams with an error when its engine process is killed, and the server exits; the
next one is ready 92 s later (143 s without its caches).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes import running
from rich.console import Console
from rich.table import Table

from llm_runtime.runtime.chaos.footprint import NodeFootprint, node_footprint
from llm_runtime.runtime.chaos.inject import Plan, Planned, node_report
from llm_runtime.runtime.chaos.report import show
from llm_runtime.runtime.chaos.run import Load, run_chaos

ROOT = Path(__file__).parents[1]
NAME = "chaos-benchmark"
DETERMINISTIC = "model.deterministic=true"
FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
console = Console(highlight=False)


def node(
    options: argparse.Namespace, *settings: str, topology: str = "smollm2.toml"
) -> contextlib.AbstractContextManager[Path]:
    """The run directory of a node that runs as long as the block."""
    return running(NAME, options.port, topology, *settings, *options.set)


def disturb(
    title: str,
    run_dir: Path,
    options: argparse.Namespace,
    plan: Plan,
    long_words: int = 0,
    **load: Any,
) -> bool:
    """One chaos run with its tables; whether nothing was lost.

    long_words: length of one request in eight; its prefill alone makes all streams pause, whoever is killed.
    load: more fields of `Load`.
    """
    console.rule(title)
    plan = dataclasses.replace(plan, controls=max(1, int(20 / plan.every_s)))
    clients = Load(options.streams, options.tokens, long_words, seed=options.seed, **load)
    outcome = asyncio.run(run_chaos(run_dir, clients, plan))
    show(outcome, console)
    return outcome.ok


def kills(options: argparse.Namespace) -> bool:
    """Random kills, about one a second, of everything but the ingress; compared with the undisturbed run."""
    plan = Plan(duration_s=0.0, kills=options.kills, signals=FATAL, seed=options.seed)
    with node(options, DETERMINISTIC) as run_dir:
        return disturb(f"{options.kills} kills, deterministic", run_dir, options, plan)


def plain(options: argparse.Namespace) -> bool:
    """The same without deterministic mode: nothing may be lost or come twice."""
    plan = Plan(duration_s=0.0, kills=options.kills, signals=FATAL, seed=options.seed + 1)
    with node(options) as run_dir:
        return disturb(f"{options.kills} kills, not deterministic", run_dir, options, plan)


def doubles(options: argparse.Namespace) -> bool:
    """Two processes within 50 ms, or one that is just starting."""
    plan = Plan(every_s=2.0, duration_s=0.0, kills=options.kills // 5, signals=FATAL, double=True, seed=options.seed)
    with node(options, DETERMINISTIC) as run_dir:
        return disturb(f"{options.kills // 5} double faults", run_dir, options, plan, options.long_prompt)


def stops(options: argparse.Namespace) -> bool:
    """SIGSTOP of every process but the root in turn, with the default deadline of 5 s."""
    with node(options, DETERMINISTIC, "ingress.workers=2") as run_dir:
        _, *others = node_report(run_dir).tree.walk()
        schedule = [Planned(9.0 * number, each.name, signal.SIGSTOP) for number, each in enumerate(others, 1)]
        plan = Plan(every_s=9.0, schedule=schedule)
        return disturb("SIGSTOP of each process", run_dir, options, plan, options.long_prompt)


def tp2(options: argparse.Namespace) -> bool:
    """Ranks of a group of two."""
    plan = Plan(
        every_s=2.0, duration_s=0.0, kills=options.kills // 10, signals=FATAL, actors=["rank"], seed=options.seed
    )
    with node(options, DETERMINISTIC, "engine.main.threads=1", topology="smollm2-tp2.toml") as run_dir:
        return disturb("ranks of tp 2", run_dir, options, plan)


def apart(options: argparse.Namespace) -> bool:
    """Prefill and decode apart, with each way to move the pages; the actors that do so, and whole engines, among the
    killed. Prompts are computed by the prefill engine however short they are."""
    plan = Plan(duration_s=0.0, kills=options.kills // 3, signals=FATAL, seed=options.seed)
    ok = True
    for transfer in ("shm", "tcp", "mooncake", "nixl"):
        settings = (DETERMINISTIC, f"transfer.engine={transfer}", "engine.decode.local_prefill_tokens=0")
        with node(options, *settings, topology="pd-smollm2.toml") as run_dir:
            ok &= disturb(f"prefill and decode apart, {transfer}", run_dir, options, plan)
    return ok


def ingress(options: argparse.Namespace) -> bool:
    """HTTP workers: the only one, then one of two at a time."""
    plan = Plan(every_s=2.0, duration_s=0.0, kills=options.kills // 10, actors=["ingress[0-9]*"], seed=options.seed)
    ok = True
    for workers in (1, 2):
        with node(options, DETERMINISTIC, f"ingress.workers={workers}") as run_dir:
            ok &= disturb(f"ingress workers, {workers} in all", run_dir, options, plan)
    return ok


def structured(options: argparse.Namespace) -> bool:
    """Everything, the ingress and supervisors too, while grammars are compiled and JSON and calls are streamed."""
    plan = Plan(duration_s=0.0, kills=options.kills // 3, signals=FATAL, actors=["*"], seed=options.seed)
    with node(options, DETERMINISTIC, "ingress.workers=2") as run_dir:
        return disturb(f"{options.kills // 3} kills, structured", run_dir, options, plan, structured=True)


def storm(options: argparse.Namespace) -> bool:
    """Prefill and decode apart with hardly any memory; one to four processes at once, any of them, while others break
    off their requests, and text, JSON, calls and several answers to a prompt are asked for."""
    signals = (*FATAL, signal.SIGSTOP, signal.SIGTERM)
    plan = Plan(
        every_s=1.5, duration_s=0.0, kills=options.kills, signals=signals, actors=["*"], most=4, seed=options.seed
    )
    settings = (
        DETERMINISTIC,
        "engine.decode.kv_tokens=768",
        "engine.prefill.kv_tokens=768",
        "engine.decode.local_prefill_tokens=0",
        "ingress.workers=2",
        "supervision.heartbeat_timeout_s=2",
        "supervision.intensity=1000",
    )
    with node(options, *settings, topology="pd-smollm2.toml") as run_dir:
        options = argparse.Namespace(**{**vars(options), "tokens": min(options.tokens, 64)})
        return disturb("storm", run_dir, options, plan, 200, structured="too", aborts=4)


def rolling(options: argparse.Namespace) -> bool:
    """Every process replaced in turn."""
    with node(options, DETERMINISTIC, "ingress.workers=2") as run_dir:
        return disturb("rolling restart", run_dir, options, Plan(every_s=2.0, rolling=True))


def leaks(options: argparse.Namespace) -> bool:
    """What the machine holds after many restarts, without load."""
    restarts = options.kills // 3
    with node(options, "supervision.intensity=1000") as run_dir:
        names = [each.name for each in node_report(run_dir).tree.walk() if each.role not in ("", "ingress")]
        for name in names:
            _restart(run_dir, name)
        before = node_footprint(run_dir)
        for turn in range(restarts):
            _restart(run_dir, names[turn % len(names)])
        time.sleep(2.0)  # until the last connections are made
        _show_footprints(restarts, before, node_footprint(run_dir))
    return True


def _restart(run_dir: Path, name: str) -> None:
    """Kills a process and waits until all processes run."""
    pid = next(each.pid for each in node_report(run_dir).tree.walk() if each.name == name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while True:
        report = node_report(run_dir)
        if report.state == "running" and all(each.pid != pid for each in report.tree.walk()):
            return
        time.sleep(0.02)


def _show_footprints(restarts: int, before: NodeFootprint, after: NodeFootprint) -> None:
    table = Table(title=f"before → after {restarts} restarts", title_justify="left")
    table.add_column("process")
    for column in ("memory of its own (PSS, MiB)", "descriptors", "threads", "arenas"):
        table.add_column(column, justify="right")
    rows = {**after.processes, "all": after.total}
    old = {**before.processes, "all": before.total}
    for name, now in rows.items():
        was = old[name]
        table.add_row(
            name,
            f"{was.anonymous_bytes / 2**20:.1f} → {now.anonymous_bytes / 2**20:.1f}",
            f"{was.descriptors} → {now.descriptors}",
            f"{was.threads} → {now.threads}",
            f"{was.arenas} → {now.arenas}",
        )
    console.print(table)
    console.print(f"socket files: {before.socket_files} → {after.socket_files}")
    console.print(f"files in the run directory: {before.run_dir_files} → {after.run_dir_files}")


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    each.__name__: each
    for each in (kills, plain, doubles, stops, tp2, apart, ingress, structured, storm, rolling, leaks)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--kills", type=int, default=300, help="of the long parts; others follow from it (%(default)s)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--long-prompt", type=int, default=700, metavar="WORDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8940)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the topology")
    options = parser.parse_args()
    failed = [name for name in options.only.split(",") if not PARTS[name](options)]
    console.rule("all parts: nothing was lost" if not failed else f"something was lost in: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
