"""Who had each core between two tokens, as `perf` has noted the kernel's scheduler.

Needs the program `perf` and the right to look at all processes: root, or kernel.perf_event_paranoid = -1.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

SWITCH = re.compile(r"\d+/(\d+) +\[(\d+)\] +([\d.]+): PERF_RECORD_SWITCH_CPU_WIDE IN ")
SHORT_US = 3.0
"""Turns shorter than this are put with what comes before them."""


class SwitchTrace:
    """Notes which thread each core turns to.

    Args:
        file: what perf writes.
    """

    def __init__(self, file: Path) -> None:
        program = shutil.which("perf")
        if program is None:
            raise SystemExit("--timeline needs the program perf: apt install linux-perf")
        self._perf, self._file = program, file
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        record = [self._perf, "record", "-q", "-e", "dummy", "--switch-events", "-a", "-k", "CLOCK_MONOTONIC"]
        self._process = subprocess.Popen([*record, "-o", str(self._file)])

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def switches(self) -> list[tuple[float, int, int]]:
        """(seconds on the clock of time.monotonic, core, thread that has it from then on), in the order of time."""
        script = [self._perf, "script", "-i", str(self._file), "--show-switch-events", "-F", "pid,tid,cpu,time"]
        told = subprocess.run(script, check=True, capture_output=True, text=True, timeout=120).stdout
        found = map(SWITCH.search, told.splitlines())
        return sorted((float(each[3]), int(each[2]), int(each[1])) for each in found if each)


@dataclass
class Lines:
    """The time lines of all cores.

    Args:
        names: of threads, by their id.
        switches: as `SwitchTrace` has noted them.
    """

    names: dict[int, str]
    switches: list[tuple[float, int, int]]
    cores: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cores = sorted({core for _, core, _ in self.switches})

    def turns(self, start: float, end: float) -> Iterator[tuple[float, float, dict[int, str]]]:
        """(from, to, who has each core) between two moments."""
        now = dict.fromkeys(self.cores, "?")
        since = start
        for at, core, thread in self.switches:
            if at >= end:
                break
            if at > since:
                yield since, at, dict(now)
                since = at
            now[core] = self._name(thread)
        yield since, end, now

    def _name(self, thread: int) -> str:
        return "" if thread == 0 else self.names.get(thread, "others")


def thread_names(processes: dict[str, int]) -> dict[int, str]:
    """Names of the threads of processes, by thread id."""
    names = {}
    for process, pid in processes.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            comm = (task / "comm").read_text()
            kind = "" if task.name == str(pid) else " (ZeroMQ)" if comm.startswith("ZMQ") else " (thread)"
            names[int(task.name)] = process + kind
    return names


def show_timeline(names: dict[int, str], switches: list[tuple[float, int, int]], arrivals: list[float]) -> None:
    """Two tables: each process's time on each core for a token, and the time line of the token of median length.

    arrivals: when the client had each token, on the clock of time.monotonic.
    """
    if not switches:
        raise ValueError("the trace is empty")
    first = switches[0][0] + 0.05
    gaps = [(b - a, a, b) for a, b in pairwise(arrivals) if a > first and b < switches[-1][0]]
    if not gaps:
        raise ValueError("no token lies within the trace")
    lines = Lines(names, switches)
    console = Console(highlight=False)
    _show_shares(console, lines, gaps)
    length, start, end = sorted(gaps)[len(gaps) // 2]
    title = f"between two tokens: {length * 1e6:,.0f} µs, the median of {len(gaps)}; an empty field is an idle core"
    table = Table(title=title, title_justify="left")
    table.add_column("from µs", justify="right")
    table.add_column("µs", justify="right")
    for core in lines.cores:
        table.add_column(f"core {core}")
    kept: list[tuple[float, float, dict[int, str]]] = []
    for since, until, who in lines.turns(start, end):
        if until <= start:
            continue
        since = max(since, start)
        if kept and (kept[-1][2] == who or (until - since) * 1e6 < SHORT_US):
            kept[-1] = kept[-1][0], until, kept[-1][2]
        else:
            kept.append((since, until, who))
    for since, until, who in kept:
        row = [f"{(since - start) * 1e6:,.0f}", f"{(until - since) * 1e6:,.0f}", *(who[core] for core in lines.cores)]
        table.add_row(*row)
    console.print(table)


def _show_shares(console: Console, lines: Lines, gaps: list[tuple[float, float, float]]) -> None:
    shares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    start, end = gaps[0][1], gaps[-1][2]
    for since, until, who in lines.turns(start, end):
        if until > start:
            for core, name in who.items():
                shares[name or "idle"][core] += until - max(since, start)
    table = Table(title=f"microseconds of a token, mean of {len(gaps)}", title_justify="left")
    table.add_column("thread")
    for core in lines.cores:
        table.add_column(f"core {core}", justify="right")
    for name, times in sorted(shares.items(), key=lambda each: -sum(each[1].values())):
        if sum(times.values()) * 1e6 / len(gaps) >= 1:
            table.add_row(name, *(f"{times[core] * 1e6 / len(gaps):,.0f}" for core in lines.cores))
    console.print(table)
