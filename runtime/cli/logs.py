"""`runtime logs`: what the processes of a node wrote, and how they crashed."""

from __future__ import annotations

import argparse
import heapq
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from runtime.cli.options import add_node
from runtime.cli.output import say
from runtime.errors import UserError
from runtime.rundir import find_node, is_running
from supervisors.exits import CrashReport, read_crashes

_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
_POLL_S = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("actor", metavar="ACTOR", nargs="?", help="only this actor; `root` is the node itself")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    add_node(parser)
    parser.epilog = "examples:\n  runtime logs\n  runtime logs main.scheduler -f"


def run(options: argparse.Namespace) -> int:
    run_dir = find_node(options.node, dead_too=True)
    logs = _Logs(run_dir, options.actor)
    logs.show_all()
    if options.follow:
        logs.follow()
    return 0


class _Logs:
    """The logs and crash reports of a node, or of one actor of it."""

    def __init__(self, run_dir: Path, actor: str | None) -> None:
        self.run_dir = run_dir
        self.actor = actor
        self.open_files: dict[str, TextIO] = {}
        self.reported: set[tuple[str, int]] = set()
        if actor is not None and actor not in (names := self._names()):
            raise UserError(f"there is no log of {actor}; there are logs of {', '.join(names)}")

    def show_all(self) -> None:
        """Prints all logs, in the order of their time stamps, and then the crash reports."""
        merged = heapq.merge(*(self._stamped(name) for name in self._selected()))
        for _, name, line in merged:
            self._print(name, line)
        self._report_crashes()

    def follow(self) -> None:
        """Prints what is added, until the node ends."""
        while is_running(self.run_dir):
            self._show_new()
            time.sleep(_POLL_S)
        self._show_new()

    def _show_new(self) -> None:
        for name in self._selected():
            for line in self._file(name):
                self._print(name, _as_text(line))
        self._report_crashes()

    def _names(self) -> list[str]:
        return sorted(path.stem for path in (self.run_dir / "logs").glob("*.log"))

    def _selected(self) -> list[str]:
        return self._names() if self.actor is None else [self.actor]

    def _file(self, name: str) -> TextIO:
        if name not in self.open_files:
            self.open_files[name] = (self.run_dir / "logs" / f"{name}.log").open(errors="replace")
        return self.open_files[name]

    def _stamped(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Lines with their time stamp; a line without one belongs to the line before."""
        stamp = ""
        for raw in self._file(name):
            line = _as_text(raw)
            if match := _TIMESTAMP.match(line):
                stamp = match[0]
            yield stamp, name, line

    def _print(self, name: str, line: str) -> None:
        line = line.rstrip("\n")
        say(line if self.actor else f"{name:<16} | {line}")

    def _report_crashes(self) -> None:
        crashes = self.run_dir / "crashes"
        names = [self.actor] if self.actor else sorted(path.stem for path in crashes.glob("*.json"))
        for name in names:
            for report in read_crashes(self.run_dir, name):
                if (name, report.incarnation) not in self.reported:
                    self.reported.add((name, report.incarnation))
                    say(_crash_text(report))


def _as_text(line: str) -> str:
    """A line of a log whose format is JSON as it would be in one of text; others as they are."""
    if not line.startswith('{"time":'):
        return line
    try:
        entry: dict[str, Any] = json.loads(line)
        at = datetime.fromisoformat(entry["time"]).astimezone()
        head = f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03d} {entry['level'].upper()} {entry['logger']}"
        request = f" [request {entry['request']}]" if "request" in entry else ""
        return "\n".join([f"{head}: {entry['message']}{request}", *filter(None, [entry.get("exception")])])
    except (ValueError, KeyError, AttributeError):
        return line


def _crash_text(report: CrashReport) -> str:
    reason = report.reason
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(reason.when))
    doing = f", while at {report.doing}" if report.doing else ""
    head = f"crash of {report.id} at {clock}: {reason.text} after {report.uptime_s:g} s{doing}"
    head += f" (pid {report.pid}, incarnation {report.incarnation})"
    return "\n".join([head, *(f"    {line}" for line in reason.traceback.splitlines())])
