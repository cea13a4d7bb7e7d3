"""What can be seen of a supervision tree: nodes, events, and the answers to which/count children."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec
import psutil

from llm_runtime.supervisors.exits import ExitReason
from llm_runtime.supervisors.spec import ChildSpec, ChildType

State = Literal["starting", "running", "unresponsive", "stopping", "stopped", "restarting", "backoff", "failed"]
EventKind = Literal["starting", "ready", "ignored", "exit", "backoff", "stopped", "gave_up", "zygote"]
StatValue = int | float | str


class NodeStatus(msgspec.Struct, kw_only=True):
    """One process of the tree.

    state        starting: not ready yet; unresponsive: runs, but its heartbeat is late; restarting: waits for siblings
                 to stop or start before it; backoff: waits before a restart; stopped: has no process and needs none;
                 failed: ended for good after a failure.
    pid          None without a process.
    incarnation  number of its latest start.
    restarts     starts after the first one, in this node's life.
    last_exit    how its last process ended; without traceback and log lines.
    doing        what its main loop last said it does, and `doing_s` for how long; empty when idle or silent.
    uptime_s     seconds since the start of its process; cpu_percent is 100 for one busy core, since the previous look
                 (since its start for the first one).
    rss_bytes    resident memory, in which each process counts what it shares with others as its own. pss_bytes: the
                 proportional set size, in which what n processes share counts for each as an n-th, so that they add up.
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
    pss_bytes: int = 0
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


@dataclass(slots=True)
class _Sample:
    """What was last read of a process. Times: monotonic seconds; `cpu_s` is its CPU time at `looked_at`."""

    process: psutil.Process
    looked_at: float
    cpu_s: float = 0.0
    cpu_percent: float = 0.0
    pss_at: float = 0.0
    pss_bytes: int = 0


class Sampler:
    """Adds what the kernel knows of each process to a tree, when somebody looks.

    The proportional set size is read rarely and never for long at once: the kernel walks all pages of a process for it.
    """

    _LEAST_INTERVAL_S = 0.2
    _PSS_INTERVAL_S = 5.0
    _PSS_BUDGET_S = 0.2

    def __init__(self) -> None:
        self._samples: dict[int, _Sample] = {}

    def fill(self, tree: NodeStatus) -> NodeStatus:
        """Sets uptime_s, rss_bytes, pss_bytes and cpu_percent of every node that has a process; returns the tree."""
        now = time.monotonic()
        samples: dict[int, _Sample] = {}
        for node in tree.walk():
            if node.pid is None:
                continue
            node.uptime_s = max(0.0, now - node.started_at)
            try:
                sample = self._samples.get(node.pid) or _Sample(psutil.Process(node.pid), node.started_at)
                node.rss_bytes = sample.process.memory_info().rss
                if now - sample.looked_at >= self._LEAST_INTERVAL_S:
                    times = sample.process.cpu_times()
                    used = times.user + times.system
                    sample.cpu_percent = max(0.0, 100.0 * (used - sample.cpu_s) / (now - sample.looked_at))
                    sample.cpu_s, sample.looked_at = used, now
            except psutil.Error:  # it is gone
                continue
            node.cpu_percent = sample.cpu_percent
            samples[node.pid] = sample
        self._samples = samples
        self._measure_pss(now)
        for node in tree.walk():
            if (known := samples.get(node.pid or 0)) is not None:
                node.pss_bytes = known.pss_bytes
        return tree

    def _measure_pss(self, now: float) -> None:
        """Reads the oldest sizes anew until the budget is spent. What has none yet shows its resident memory."""
        for sample in sorted(self._samples.values(), key=lambda each: each.pss_at):
            if sample.pss_at and now - sample.pss_at < self._PSS_INTERVAL_S:
                return
            try:
                if time.monotonic() - now < self._PSS_BUDGET_S:
                    sample.pss_bytes, sample.pss_at = sample.process.memory_full_info().pss, now
                elif not sample.pss_at:
                    sample.pss_bytes = sample.process.memory_info().rss
            except psutil.Error:  # it is gone, or the kernel does not tell
                sample.pss_at = now
