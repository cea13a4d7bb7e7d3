"""What can be seen of a supervision tree: nodes, events, and the answers to which/count children."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import msgspec

from supervisors.exits import ExitReason
from supervisors.linux import cpu_seconds, rss_bytes
from supervisors.spec import ChildSpec, ChildType

State = Literal["starting", "running", "stopping", "stopped", "restarting", "backoff", "failed"]
EventKind = Literal["starting", "ready", "ignored", "exit", "backoff", "stopped", "gave_up", "zygote"]
StatValue = int | float | str


class NodeStatus(msgspec.Struct, kw_only=True):
    """One process of the tree.

    state        starting: not ready yet; restarting: waits for siblings to stop or start before it; backoff: waits
                 before a restart; stopped: has no process and needs none; failed: ended for good after a failure.
    pid          None without a process.
    incarnation  number of its latest start.
    restarts     starts after the first one, by this incarnation of its supervisor.
    last_exit    how its last process ended; without traceback and log lines.
    doing        what its main loop last said it does, and `doing_s` for how long; empty when idle or silent.
    uptime_s     seconds since the start of its process; rss_bytes includes shared pages; cpu_percent is 100 for
                 one busy core, since the previous look (since its start for the first one).
    stats        what the child adds to each heartbeat.
    """

    name: str
    kind: ChildType
    role: str = ""
    pid: int | None = None
    state: State = "stopped"
    incarnation: int = 0
    restarts: int = 0
    last_exit: ExitReason | None = None
    doing: str = ""
    doing_s: float = 0.0
    started_at: float = 0.0
    uptime_s: float = 0.0
    rss_bytes: int = 0
    cpu_percent: float = 0.0
    stats: dict[str, StatValue] = {}
    children: list[NodeStatus] = []

    def walk(self) -> Iterator[NodeStatus]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a child; `when` is unix time in seconds, and `crash` marks an exit that nobody asked
    for and that was no normal end."""

    kind: EventKind
    id: str
    text: str = ""
    pid: int | None = None
    incarnation: int = 0
    when: float = 0.0
    crash: bool = False


class ChildInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of which_children."""

    id: str
    pid: int | None
    state: State
    type: ChildType


class ChildCounts(msgspec.Struct, frozen=True, kw_only=True):
    """OTP's count_children: specifications held, children with a process, and how many are of each type."""

    specs: int
    active: int
    supervisors: int
    workers: int


class Culprit(msgspec.Struct, frozen=True, kw_only=True):
    """The actor because of which a supervisor ended, its last exit and its log."""

    id: str
    reason: ExitReason
    log: str


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """Why a supervisor ended: `ok` after a shutdown that was asked for (or an auto_shutdown), else a failure with its
    sentence in `text` and the actor that caused it."""

    ok: bool
    text: str
    culprit: Culprit | None = None


def stopped_tree(spec: ChildSpec) -> NodeStatus:
    """The status of a child, and of all below it, of which nothing is known yet."""
    below = spec.supervisor
    dynamic = below is None or below.strategy == "simple_one_for_one"
    children = [] if below is None or dynamic else [stopped_tree(child) for child in below.children]
    return NodeStatus(name=spec.id, kind=spec.type, role=spec.role, children=children)


class Sampler:
    """Adds what the kernel knows of each process to a tree, when somebody looks."""

    _LEAST_INTERVAL_S = 0.2

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float]] = {}  # pid: when, CPU seconds, last percentage

    def fill(self, tree: NodeStatus) -> NodeStatus:
        """Sets uptime_s, rss_bytes and cpu_percent of every node that has a process; returns the tree."""
        now = time.monotonic()
        nodes = [node for node in tree.walk() if node.pid is not None]
        for node in nodes:
            assert node.pid is not None
            node.uptime_s = max(0.0, now - node.started_at)
            node.rss_bytes = rss_bytes(node.pid)
            node.cpu_percent = self._cpu_percent(node.pid, now, node.started_at)
        living = {node.pid for node in nodes}
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in living}
        return tree

    def _cpu_percent(self, pid: int, now: float, started_at: float) -> float:
        when, used, percent = self._seen.get(pid, (started_at, 0.0, 0.0))
        if now - when < self._LEAST_INTERVAL_S:
            return percent
        current = cpu_seconds(pid)
        if current is None:
            return 0.0
        percent = max(0.0, 100.0 * (current - used) / (now - when))
        self._seen[pid] = (now, current, percent)
        return percent
