"""`runtime top`: the processes and figures of a running node, live."""

from __future__ import annotations

import argparse
import contextlib
import math
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runtime.cli.options import add_node
from runtime.control import NodeReport, Status, ask
from runtime.errors import UserError
from runtime.figures import Sample, quantile, rate, read_metrics
from runtime.rundir import find_node
from supervisors.status import NodeStatus

_STYLES = {
    "running": "green",
    "starting": "yellow",
    "restarting": "yellow",
    "unresponsive": "red",
    "backoff": "red",
    "failed": "red",
}
_NARROWEST = 140


def configure(parser: argparse.ArgumentParser) -> None:
    add_node(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.epilog = "example: runtime top --node smollm2-8000\nq or Ctrl-C ends it."


def run(options: argparse.Namespace) -> int:
    run_dir = find_node(options.node)
    interval_s = max(0.1, options.interval)
    console = Console(highlight=False)
    if console.width < _NARROWEST and not console.is_terminal:
        console.width = _NARROWEST
    before: Sample | None = None

    def look() -> Group:
        nonlocal before
        report = ask(run_dir, Status())
        if not isinstance(report, NodeReport):
            raise UserError(report.error)
        now = read_metrics(report.url, time.monotonic()) if report.url else None
        shown = frame(report, now, before)
        before = now
        return shown

    look()  # rates need two looks
    with _keys() as pressed:
        if options.once:
            time.sleep(interval_s)
            console.print(look())
            return 0
        with Live(look(), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while pressed(interval_s) != "q":
                live.update(look(), refresh=True)
    return 0


def frame(report: NodeReport, now: Sample | None, before: Sample | None) -> Group:
    """What is shown of a node at a time."""
    clock = time.strftime("%H:%M:%S")
    if not report.url:
        head = Text.assemble((report.node, "bold"), f"  {report.state}, without an ingress  {clock}")
        return Group(head, Text(), _processes(report.tree))
    head = Text.assemble((report.node, "bold"), f"  {report.state} at {report.url}  {clock}")
    return Group(head, _figures(now, before), Text(), _processes(report.tree))


def _figures(now: Sample | None, before: Sample | None) -> Text:
    if now is None:
        return Text("the ingress does not answer", style="yellow")
    values = now.values
    times = {
        name: [1000 * quantile(now, before, f"sglang:{metric}_seconds", part) for part in (0.5, 0.99)]
        for name, metric in (("TTFT", "time_to_first_token"), ("ITL", "inter_token_latency"))
    }
    parts = [
        f"{_number(rate(now, before, 'sglang:generation_tokens_total'))} tokens/s",
        f"{values.get('sglang:num_running_reqs', 0):.0f} running",
        f"{values.get('sglang:num_queue_reqs', 0):.0f} waiting",
        f"cache {100 * values.get('sglang:token_usage', 0):.0f}% used",
        f"{100 * values.get('sglang:cache_hit_rate', 0):.0f}% hits",
        *(f"{name} p50 {_number(p50)} p99 {_number(p99)} ms" for name, (p50, p99) in times.items()),
    ]
    return Text("   ".join(parts))


def _processes(tree: NodeStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("process", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("pid", "cpu", "memory", "restarts"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("last exit", no_wrap=True)
    table.add_column("now", no_wrap=True)
    for depth, node in _with_depths(tree):
        table.add_row(
            "  " * depth + node.name,
            Text(node.state, style=_STYLES.get(node.state, "")),
            str(node.pid or "-"),
            f"{node.cpu_percent:.0f}%",
            f"{node.pss_bytes / 2**20:.0f}M",
            str(node.restarts),
            _last_exit(node),
            f"{node.doing} {node.doing_s:.1f} s" if node.doing else "",
        )
    return table


def _last_exit(node: NodeStatus) -> str:
    if node.last_exit is None:
        return "-"
    return f"{node.last_exit.text} at {time.strftime('%H:%M:%S', time.localtime(node.last_exit.when))}"


def _with_depths(node: NodeStatus, depth: int = 0) -> Iterator[tuple[int, NodeStatus]]:
    yield depth, node
    for child in node.children:
        yield from _with_depths(child, depth + 1)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


class _Keyboard:
    """Waits for a key on a terminal, or for time to pass elsewhere."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def __call__(self, timeout_s: float) -> str:
        if not self._terminal:
            time.sleep(timeout_s)
            return ""
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return sys.stdin.read(1) if ready else ""


@contextlib.contextmanager
def _keys() -> Iterator[_Keyboard]:
    """Single keys without echo, for as long as the block runs."""
    if not sys.stdin.isatty():
        yield _Keyboard(False)
        return
    saved = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _Keyboard(True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
