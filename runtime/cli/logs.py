"""`runtime logs`: what the processes of a node wrote, and how they crashed."""

from __future__ import annotations

import argparse
import heapq
import json
import re
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import find_node, is_running
from llm_runtime.supervisors.exits import CrashReport, read_crashes
from llm_runtime.supervisors.logs import one_line

_HEAD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_POLL_S = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("actor", metavar="ACTOR", nargs="?", help="only this actor; `root` is the node itself")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("-n", "--tail", type=_count, metavar="N", help="only the last N records")
    parser.add_argument(
        "--since", type=_moment, metavar="WHEN", help="only what is newer: 30s, 5m, 2h, 1d, 14:30, 2026-01-31T14:30"
    )
    parser.add_argument("--level", choices=_LEVELS, default="debug", help="only this level and above")
    add_node(parser)
    parser.epilog = "examples:\n  runtime logs --since 10m --level warning\n  runtime logs main.scheduler --tail 20 -f"


def run(options: argparse.Namespace) -> int:
    run_dir = find_node(options.node, dead_too=True)
    logs = _Logs(run_dir, options.actor, options.level, options.since)
    logs.show_all(options.tail)
    if options.follow:
        logs.follow()
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of records")
    return int(text)


def _moment(text: str) -> float:
    """Unix time of "5m" (so long ago), of a time of today, or of a date with a time."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return time.time() - float(match[1]) * _UNIT_S[match[2]]
    today = f"{datetime.now():%Y-%m-%d}T"
    try:
        return datetime.fromisoformat(text if "-" in text else today + text).timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: give 30s, 5m, 2h or 1d, a time such as 14:30, or a date such as 2026-01-31T14:30"
        ) from None


class _Record(NamedTuple):
    """An entry of a log, or a crash report: one line or several. `at` is unix time."""

    at: float
    actor: str
    level: str
    lines: list[str]


class _Logs:
    """The logs and crash reports of a node, or of one actor of it."""

    def __init__(self, run_dir: Path, actor: str | None, level: str, since: float | None) -> None:
        self.run_dir = run_dir
        self.actor = actor
        self._levels = _LEVELS[_LEVELS.index(level) :]
        self._since = since or 0.0
        self._files: dict[str, TextIO] = {}
        self._reported: set[tuple[str, int]] = set()
        self._last: dict[str, _Record] = {}
        if actor is not None and actor not in (names := self._names()):
            raise UserError(f"there is no log of {actor}; there are logs of {', '.join(names)}")

    def show_all(self, tail: int | None) -> None:
        """Prints logs and crash reports in the order of their time stamps; only the last `tail` records, if given."""
        records = heapq.merge(
            *(self._records(name) for name in self._selected()), self._crashes(), key=lambda record: record.at
        )
        wanted = filter(self._is_wanted, records)
        for record in wanted if tail is None else deque(wanted, maxlen=tail):
            self._print(record)

    def follow(self) -> None:
        """Prints what is added, until the node ends."""
        while is_running(self.run_dir):
            self._show_new()
            time.sleep(_POLL_S)
        self._show_new()

    def _show_new(self) -> None:
        for record in [*chain(*(self._records(name) for name in self._selected())), *self._crashes()]:
            if self._is_wanted(record):
                self._print(record)

    def _names(self) -> list[str]:
        return sorted(path.stem for path in (self.run_dir / "logs").glob("*.log"))

    def _selected(self) -> list[str]:
        return self._names() if self.actor is None else [self.actor]

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._files[name] = (self.run_dir / "logs" / f"{name}.log").open(errors="replace")
        return self._files[name]

    def _records(self, name: str) -> Iterator[_Record]:
        """What is new in a log. A line without a time stamp belongs to the line before."""
        record: _Record | None = None
        for raw in self._file(name):
            for line in _as_text(raw.rstrip("\n")).split("\n"):
                if match := _HEAD.match(line):
                    if record is not None:
                        yield record
                    at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                    record = _Record(at, name, match[2].lower(), [line])
                elif record is not None:
                    record.lines.append(line)
                else:  # the rest of a record that was shown already, or of nothing
                    before = self._last.get(name, _Record(0.0, name, "error", []))
                    record = before._replace(lines=[line])
        if record is not None:
            self._last[name] = record
            yield record

    def _crashes(self) -> Iterator[_Record]:
        """Crash reports that were not shown yet, oldest first."""
        crashes = self.run_dir / "crashes"
        names = [self.actor] if self.actor else sorted(path.stem for path in crashes.glob("*.json"))
        for report in sorted(
            (report for name in names for report in read_crashes(self.run_dir, name)),
            key=lambda report: report.reason.when,
        ):
            if (report.id, report.incarnation) not in self._reported:
                self._reported.add((report.id, report.incarnation))
                yield _Record(report.reason.when, report.id, "error", _crash_text(report))

    def _is_wanted(self, record: _Record) -> bool:
        return record.at >= self._since and record.level in self._levels

    def _print(self, record: _Record) -> None:
        for line in map(one_line, record.lines):
            say(line if self.actor else f"{record.actor:<16} | {line}")


def _as_text(line: str) -> str:
    """A line of a log whose format is JSON as it would be in one of text; others as they are."""
    if not line.startswith('{"time":'):
        return line
    try:
        entry: dict[str, Any] = json.loads(line)
        at = datetime.fromisoformat(entry["time"]).astimezone()
        head = f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03d} {entry['level'].upper()} {entry['logger']}"
        request = f" [request {entry['request']}]" if "request" in entry else ""
        return "\n".join([one_line(f"{head}: {entry['message']}{request}"), *filter(None, [entry.get("exception")])])
    except (ValueError, KeyError, AttributeError):
        return line


def _crash_text(report: CrashReport) -> list[str]:
    reason = report.reason
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(reason.when))
    doing = f", while at {report.doing}" if report.doing else ""
    head = f"crash of {report.id} at {clock}: {reason.text} after {report.uptime_s:g} s{doing}"
    head += f" (pid {report.pid}, incarnation {report.incarnation})"
    return [head, *(f"    {line}" for line in reason.traceback.splitlines())]
