"""`runtime status`: the tree of a running node."""

from __future__ import annotations

import argparse
import json

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.control import NodeReport, Status, ask
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.report import as_json
from llm_runtime.runtime.rundir import find_node
from llm_runtime.supervisors.status import NodeStatus

_HEADER = ("NAME", "STATE", "PID", "UPTIME", "RESTARTS", "CPU", "MEMORY", "LAST EXIT", "NOW")


def configure(parser: argparse.ArgumentParser) -> None:
    add_node(parser)
    parser.add_argument("--json", action="store_true", help="print the tree as JSON, for programs")
    parser.epilog = "example: runtime status --node smollm2-8000 --json"


def run(options: argparse.Namespace) -> int:
    report = ask(find_node(options.node), Status())
    if not isinstance(report, NodeReport):
        raise UserError(report.error)
    if options.json:
        say(json.dumps(as_json(report)))
        return 0
    say(f"{report.node}: {report.state}" + (f" at {report.url}" if report.url else ""))
    rows = [_HEADER, *_rows(report.tree)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _rows(status: NodeStatus, indent: str = "") -> list[tuple[str, ...]]:
    row = (
        indent + status.name,
        status.state,
        str(status.pid or "-"),
        _duration(status.uptime_s) if status.pid else "-",
        str(status.restarts),
        f"{status.cpu_percent:.0f}%",
        f"{status.pss_bytes / 2**20:.0f}M",
        status.last_exit.text if status.last_exit else "-",
        _now(status),
    )
    return [row, *(line for child in status.children for line in _rows(child, indent + "  "))]


def _now(status: NodeStatus) -> str:
    """What a process is at: a scheduler's requests, else what its main loop last said."""
    if "num_running_reqs" in status.stats:
        return f"{status.stats['num_running_reqs']} running, {status.stats['num_queue_reqs']} waiting"
    return f"{status.doing} for {status.doing_s:.1f} s" if status.doing else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{seconds:.1f}s"
