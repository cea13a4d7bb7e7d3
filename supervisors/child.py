"""A supervisor's record of one of its children."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from llm_runtime.supervisors.exits import ExitReason
from llm_runtime.supervisors.fd_store import FdStore
from llm_runtime.supervisors.process import Process
from llm_runtime.supervisors.restarts import Delay
from llm_runtime.supervisors.spec import ChildSpec
from llm_runtime.supervisors.status import Culprit, NodeStatus, State, stopped_tree

Done = Callable[[str], None]
"""Told the outcome of a command: an error sentence, or "" when done."""


LATE_BEATS = 2
"""A child that has said nothing for more heartbeats than this does not answer. It may yet: it is killed later."""

Trial = Literal["give_up", "stay", "forget", ""]


@dataclass(eq=False)
class Child:
    """What is wanted of a child and what it is at.

    wanted      it shall have a process.
    in_wave     it takes part in an ordered stop and start (of all children, or of a group): stops right to left, then
                starts left to right, each when the one before is ready.
    bounce      its present process must end before it starts again.
    not_before  back-off: no start before this monotonic time.
    trial       what follows if it does not become ready: its supervisor gives up (at the first start of all, unless it
                was only struck by a signal), it stays stopped (started again by command), it is forgotten (added at
                run time), or "": it is restarted.
    incarnation number of its latest start, in this node's life. starts: by this incarnation of the supervisor.
    culprit     the actor because of which its last process, a supervisor, ended.
    """

    spec: ChildSpec
    delay: Delay
    fd_store: FdStore = field(default_factory=FdStore)
    wanted: bool = True
    in_wave: bool = False
    bounce: bool = False
    not_before: float = 0.0
    trial: Trial = "give_up"
    state: State = "stopped"
    process: Process | None = None
    incarnation: int = 0
    starts: int = 0
    last_exit: ExitReason | None = None
    culprit: Culprit | None = None
    subtree: list[NodeStatus] = field(default_factory=list)
    up_waiters: list[Done] = field(default_factory=list)
    down_waiters: list[Done] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.subtree = stopped_tree(self.spec).children

    @property
    def must_stop(self) -> bool:
        return self.process is not None and (self.bounce or not self.wanted)

    @property
    def is_ready(self) -> bool:
        return self.process is not None and self.process.ready_at is not None

    def came_up(self, error: str = "") -> None:
        """Answers those who wait for its start."""
        waiters, self.up_waiters = self.up_waiters, []
        for done in waiters:
            done(error)

    def came_down(self) -> None:
        """Answers those who wait for its stop."""
        waiters, self.down_waiters = self.down_waiters, []
        for done in waiters:
            done("")

    def subtree_stopped(self) -> None:
        """Its process is gone, and so are all below it."""
        for top in self.subtree:
            for node in top.walk():
                node.pid, node.state, node.doing, node.stats = None, "stopped", "", {}

    def contains(self, name: str) -> bool:
        """Whether `name` is below this child."""
        return any(node.name == name for top in self.subtree for node in top.walk())

    def status(self) -> NodeStatus:
        """A snapshot, with what was last heard of its subtree."""
        process, now = self.process, time.monotonic()
        node = NodeStatus(
            name=self.spec.id,
            kind=self.spec.type,
            role=self.spec.role,
            state=self.state,
            incarnation=self.incarnation,
            restarts=max(0, self.incarnation - 1),
            last_exit=None if self.last_exit is None else self.last_exit.brief(),
            children=msgspec.convert(msgspec.to_builtins(self.subtree), list[NodeStatus]),
        )
        if process is not None:
            node.pid = process.pid or None
            node.started_at = process.started_at
            node.stats = dict(process.stats)
            silent_s = now - process.last_beat
            if self.state == "running" and silent_s > LATE_BEATS * self.spec.heartbeat_s:
                node.state, node.doing, node.doing_s = "unresponsive", "not answering", silent_s
            elif process.doing:
                node.doing, node.doing_s = process.doing, now - process.doing_since
        return node
