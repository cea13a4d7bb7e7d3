"""`runtime top`: the processes and figures of a running node, live."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.control import NodeReport, Status, ask
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.figures import Sample, rate, read_metrics, recent_quantile
from llm_runtime.runtime.happenings import Happening
from llm_runtime.runtime.rundir import find_node
from llm_runtime.supervisors.status import NodeStatus

_STYLES = {
    "running": "green",
    "starting": "yellow",
    "restarting": "yellow",
    "unresponsive": "red",
    "backoff": "red",
    "failed": "red",
}
_WIDE = 140
_NARROW = 100
"""Below so many columns the table has fewer."""
_WINDOW_S = 60.0
"""Times are those of so many seconds."""
_EVENTS = 5
_LAST_EXIT = 6
"""The column that is cut."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_node(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.epilog = "example: runtime top --node smollm2-8000\nq or Ctrl-C ends it."


def run(options: argparse.Namespace) -> int:
    run_dir = find_node(options.node)
    interval_s = max(0.1, options.interval)
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _WIDE)
    past: deque[Sample] = deque()

    def look() -> Group:
        report = ask(run_dir, Status())
        if not isinstance(report, NodeReport):
            raise UserError(report.error)
        now = read_metrics(report.url, time.monotonic()) if report.url else None
        shown = frame(report, now, past, console.width)
        if now is not None:
            past.append(now)
            while now.at - past[0].at > _WINDOW_S:
                past.popleft()
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


def frame(report: NodeReport, now: Sample | None, past: Sequence[Sample], width: int) -> Group:
    """What is shown of a node at a time.

    Args:
        past: earlier samples, the oldest first.
        width: columns of the terminal.
    """
    clock = time.strftime("%H:%M:%S")
    where = f"{report.state} at {report.url}" if report.url else f"{report.state}, without an ingress"
    parts: list[Text | Table] = [Text.assemble((report.node, "bold"), f"  {where}  {clock}")]
    if report.url:
        parts.append(_figures(now, past, width))
    parts += [Text(), _processes(report.tree, width)]
    if events := report.events[-_EVENTS:]:
        parts += [Text(), _events(events)]
    return Group(*parts)


def _figures(now: Sample | None, past: Sequence[Sample], width: int) -> Text:
    if now is None:
        return Text("the ingress does not answer", style="yellow")
    before = past[-1] if past else None
    first = past[0] if past else None

    def held(metric: str) -> str:
        return f"{now.values.get(f'sglang:{metric}', 0):,.0f}"

    def times(metric: str) -> str:
        p50, p99 = (recent_quantile(now, first, f"sglang:{metric}_seconds", part) for part in (0.5, 0.99))
        return "-" if math.isnan(p50) else f"p50 {_time(p50)} p99 {_time(p99)}"

    parts = [
        f"{_number(rate(now, before, 'sglang:generation_tokens_total'))} tokens/s",
        f"{held('num_running_reqs')} running",
        f"{held('num_queue_reqs')} waiting",
        f"KV {held('num_used_tokens')} of {held('max_total_num_tokens')} tokens",
        f"TTFT {times('time_to_first_token')}",
        f"ITL {times('inter_token_latency')}",
        f"queue {times('queue_time')}",
        f"E2E {times('e2e_request_latency')}",
    ]
    lines = [parts[0]]
    for part in parts[1:]:
        together = f"{lines[-1]}   {part}"
        lines[-1:] = [together] if len(together) <= width else [lines[-1], part]
    return Text("\n".join(lines))


def _processes(tree: NodeStatus, width: int) -> Table:
    """A table that fits: a narrow one leaves out what tells least, and cuts the last exit."""
    wide, roomy = width >= _WIDE, width >= _NARROW
    rows = [
        [
            ("  " if roomy else " ") * depth + node.name,
            node.state,
            str(node.pid or "-"),
            f"{node.cpu_percent:.0f}%",
            f"{node.pss_bytes / 2**20:.0f}M",
            str(node.restarts),
            _last_exit(node),
            f"{node.doing} {node.doing_s:.1f} s" if node.doing else "",
        ]
        for depth, node in _with_depths(tree)
    ]
    heads = ["process", "state", *(("pid", "cpu", "memory", "restarts") if roomy else ("pid", "cpu", "mem", "re"))]
    heads += ["last exit", "now"] if wide else ["last exit"]
    gap = 2 if wide else 1
    widths = [max(len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    others = sum(widths) - widths[_LAST_EXIT] + gap * len(heads)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if 2 <= i < _LAST_EXIT else "left", no_wrap=True)
    for row in rows:
        exit_text = Text(row[_LAST_EXIT])
        exit_text.truncate(max(8, width - others), overflow="ellipsis")
        state = Text(row[1], style=_STYLES.get(row[1], ""))
        table.add_row(row[0], state, *row[2:_LAST_EXIT], exit_text, *row[_LAST_EXIT + 1 : len(heads)])
    return table


def _last_exit(node: NodeStatus) -> str:
    """The time comes first: it is never cut."""
    if node.last_exit is None:
        return "-"
    return f"{_clock(node.last_exit.when)} {node.last_exit.text}"


def _events(events: Sequence[Happening]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for event in events:
        away = f", away {_time(event.away_s)}" if event.away_s is not None else ""
        style = "red" if event.crash else ""
        table.add_row(_clock(event.when), event.name or "node", Text(f"{event.text or event.kind}{away}", style=style))
    return table


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


def _with_depths(node: NodeStatus, depth: int = 0) -> Iterator[tuple[int, NodeStatus]]:
    yield depth, node
    for child in node.children:
        yield from _with_depths(child, depth + 1)


def _time(seconds: float) -> str:
    """With its unit; "-" if it is not known."""
    if math.isnan(seconds):
        return "-"
    return f"{_number(1000 * seconds)} ms" if seconds < 1 else f"{seconds:.1f} s"


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
