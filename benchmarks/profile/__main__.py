"""Where each microsecond of a decode step goes, process by process.

    python benchmarks/profile [FILE] [--batch 16] [--set model.dtype=bfloat16] [--port 8960]
    python benchmarks/profile --batch 1 --timeline          # who has each core between two tokens; with perf, as root

A node serves as many streams as `--batch` says. While all of them decode, three things are looked at and divided by
the number of steps: the processor time of every thread and how long it waited for a core (the kernel's accounting),
the time that each actor waited for messages, and the rank's own account of its steps. Then the bare executor runs the
same batch and times every kernel of a step. With --timeline, perf's record of the kernel's scheduler shows the time
lines of all cores between two tokens as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table
from timeline import SwitchTrace, show_timeline, thread_names

ROOT = Path(__file__).resolve().parents[2]
NAME = "profile"
LINEARS = ("queries, keys, values", "attention output", "gate and up", "down")
REPORTED_AFTER_S = 1.5
"""By then what the actors say of themselves leaves the prefill out."""
console = Console(highlight=False)


@dataclass(frozen=True)
class Threads:
    """Nanoseconds of one process since its start, by kind of thread: running, and ready but without a core."""

    running: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    delayed: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @classmethod
    def of(cls, pid: int) -> Threads:
        threads = cls()
        for task in Path(f"/proc/{pid}/task").iterdir():
            name = (task / "comm").read_text()
            kind = "main" if task.name == str(pid) else "ZeroMQ" if name.startswith("ZMQ") else "others"
            running, delayed, _ = map(int, (task / "schedstat").read_text().split())
            threads.running[kind] += running
            threads.delayed[kind] += delayed
        return threads


@dataclass(frozen=True)
class Snapshot:
    """A running node at one moment; `stats` are what the actors told last, at most a second ago."""

    at: float
    threads: dict[str, Threads]
    stats: dict[str, dict[str, float]]
    pids: dict[str, int]

    @classmethod
    def take(cls, run_dir: Path) -> Snapshot:
        from llm_runtime.runtime.chaos.inject import node_report

        processes = [each for each in node_report(run_dir).tree.walk() if each.pid is not None]
        stats = {each.name: {k: v for k, v in each.stats.items() if not isinstance(v, str)} for each in processes}
        pids = {each.name: each.pid for each in processes if each.pid is not None}
        threads = {name: Threads.of(pid) for name, pid in {**pids, "client": os.getpid()}.items()}
        return cls(time.perf_counter(), threads, stats, pids)


async def decode(
    url: str, run_dir: Path, options: argparse.Namespace, trace: SwitchTrace | None
) -> tuple[Snapshot, Snapshot, float, list[float]]:
    """Snapshots at the beginning and the end of a time in which all streams decode, the steps between them, and when
    tokens arrived."""
    started, tokens, ended = 0, 0, asyncio.Event()
    all_started = asyncio.Event()
    arrivals: list[float] = []

    async def stream(session: aiohttp.ClientSession, prompt: list[int]) -> None:
        nonlocal started, tokens
        body = {"model": model, "prompt": prompt, "max_tokens": options.output, "temperature": options.temperature}
        body |= {"ignore_eos": True, "stream": True}
        first = True
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    tokens += 1
                    arrivals.append(time.monotonic())
                    started += first
                    first = False
                    if started == options.batch:
                        all_started.set()
        ended.set()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        prompts = np.random.default_rng(0).integers(100, 40_000, (options.batch, options.input)).tolist()
        streams = [asyncio.create_task(stream(session, prompt)) for prompt in prompts]
        await asyncio.wait_for(all_started.wait(), 300)
        await asyncio.sleep(REPORTED_AFTER_S)
        before, tokens_before = Snapshot.take(run_dir), tokens
        after, tokens_after = before, tokens_before
        if trace is not None:
            trace.start()
        while not ended.is_set():
            after, tokens_after = Snapshot.take(run_dir), tokens
            await asyncio.sleep(0.25)
        if trace is not None:
            trace.stop()
        await asyncio.gather(*streams)
    if tokens_after == tokens_before:
        sys.exit("the streams ended too soon: give a larger --output")
    return before, after, (tokens_after - tokens_before) / options.batch, arrivals


def show_node(before: Snapshot, after: Snapshot, steps: float, batch: int) -> None:
    step_us = (after.at - before.at) * 1e6 / steps
    title = f"{batch} streams, {steps:.0f} steps of {step_us:,.0f} µs: microseconds of each step"
    table = Table(title=title, title_justify="left")
    for column in ("process", "main thread", "ZeroMQ", "other threads", "without a core", "waiting for messages"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, now in after.threads.items():
        was = before.threads.get(name)
        if was is None:
            continue
        running = [(now.running[kind] - was.running[kind]) / 1e3 / steps for kind in ("main", "ZeroMQ", "others")]
        delayed = (sum(now.delayed.values()) - sum(was.delayed.values())) / 1e3 / steps
        if sum(running) < 1:
            continue
        waited = _difference(before, after, name, "waited_seconds")
        seconds = _difference(before, after, name, "alive_seconds")
        idle = f"{waited / seconds * step_us:,.0f}" if seconds and "waited_seconds" in after.stats[name] else ""
        table.add_row(name, *(f"{each:,.0f}" for each in (*running, delayed)), idle)
    console.print(table)


def show_rank(before: Snapshot, after: Snapshot) -> None:
    """The time of the first rank's main thread, as it accounts for it itself."""
    rank = next((name for name in after.stats if name.endswith("rank0")), None)
    steps = _difference(before, after, rank, "decode_steps") if rank else 0
    if not rank or not steps:
        console.print("no decode step went through a kernel graph")
        return
    parts = {
        "waiting for a step": _difference(before, after, rank, "waited_seconds"),
        "checking it, filling arrays": _difference(before, after, rank, "decode_arrays_seconds"),
        "model": _difference(before, after, rank, "decode_model_seconds"),
        "drawing tokens": _difference(before, after, rank, "decode_drawing_seconds"),
    }
    whole = _difference(before, after, rank, "alive_seconds")
    parts["messages and all else"] = whole - sum(parts.values())
    table = Table(title=f"{rank}: microseconds of a decode step", title_justify="left")
    table.add_column("part")
    table.add_column("µs", justify="right")
    for name, seconds in (*parts.items(), ("step", whole)):
        table.add_row(name, f"{seconds / steps * 1e6:,.0f}")
    console.print(table)


def _difference(before: Snapshot, after: Snapshot, actor: str, figure: str) -> float:
    return after.stats.get(actor, {}).get(figure, 0.0) - before.stats.get(actor, {}).get(figure, 0.0)


def show_kernels(options: argparse.Namespace) -> None:
    """Times the kernels of a decode step of the bare executor, in this process."""
    from llm_runtime.runtime.bench.executor import Batch, executor_for, run_batch
    from llm_runtime.runtime.plan import plan_node
    from llm_runtime.runtime.topology import load_topology

    plan = plan_node(load_topology(options.file, options.set, options.port))
    batch = Batch(options.batch, options.batch, options.input, options.output, 512)
    executor = executor_for(plan, batch)
    steps = [timing.duration_s for timing in run_batch(executor, batch) if not timing.prefilled]
    runs = [executor.graphs.timed(options.batch) if executor.graphs else [] for _ in range(20)]
    if not runs[0]:
        console.print("the executor has no kernel graph for this batch")
        return
    medians = np.median([[seconds for _, seconds in run] for run in runs], axis=0) * 1e6
    names = [name for name, _ in runs[0]]
    last_linear = max(i for i, name in enumerate(names) if "linear" in name)
    kinds: dict[str, list[float]] = defaultdict(list)
    places = cycle(LINEARS)
    for i, (name, time_us) in enumerate(zip(names, medians.tolist(), strict=True)):
        if "linear" in name:
            name += ", logits" if i == last_linear else f", {next(places)}"
        kinds[name].append(time_us)
    table = Table(title=f"kernels of a decode step of {options.batch} rows, bare executor", title_justify="left")
    for column in ("kernel", "calls", "µs each", "µs"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, times in sorted(kinds.items(), key=lambda kind: -sum(kind[1])):
        table.add_row(name, str(len(times)), f"{sum(times) / len(times):,.1f}", f"{sum(times):,.0f}")
    table.add_row("all kernels", str(len(names)), "", f"{medians.sum():,.0f}")
    table.add_row("step, with all that is around them", "", "", f"{np.median(steps) * 1e6:,.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "topology" / "smollm2.toml")
    parser.add_argument("--batch", type=int, default=16, help="streams (%(default)s)")
    parser.add_argument("--input", type=int, default=256, help="prompt tokens (%(default)s)")
    parser.add_argument("--output", type=int, help="output tokens (512, and more for few streams: they are fast)")
    parser.add_argument("--port", type=int, default=8960)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key of the topology")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the streams (%(default)s)")
    parser.add_argument("--timeline", action="store_true", help="show who has each core between two tokens")
    parser.add_argument("--kernels", action="store_true", help="time the kernels only, without a node")
    options = parser.parse_args()
    options.output = options.output or max(512, 2048 // options.batch)
    if options.kernels:
        show_kernels(options)
        return
    from llm_runtime.runtime.rundir import base_directory

    scratch = tempfile.TemporaryDirectory()
    trace = SwitchTrace(Path(scratch.name) / "switches") if options.timeline else None
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    runtime = [sys.executable, "-m", "llm_runtime"]
    up = [*runtime, "up", str(options.file), "--detach", "--port", str(options.port), "--set", f"node.name={NAME}"]
    for setting in options.set:
        up += ["--set", setting]
    subprocess.run(up, check=True, env=environment, stdout=subprocess.DEVNULL)
    try:
        run_dir = base_directory() / NAME
        url = f"http://127.0.0.1:{options.port}"
        before, after, steps, arrivals = asyncio.run(decode(url, run_dir, options, trace))
        if trace is not None:
            show_timeline(thread_names({**after.pids, "client": os.getpid()}), trace.switches(), arrivals)
    finally:
        if trace is not None:
            trace.stop()
        subprocess.run([*runtime, "down", "--node", NAME], env=environment, stdout=subprocess.DEVNULL)
    show_node(before, after, steps, options.batch)
    show_rank(before, after)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--kernels"], check=True, env=environment)


if __name__ == "__main__":
    main()
