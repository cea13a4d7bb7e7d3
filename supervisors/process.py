"""One life of a child, as its supervisor sees it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.exits import ExitKind, ExitReason, reason_of
from llm_runtime.supervisors.linux import is_stopped
from llm_runtime.supervisors.loop import pidfd_kill
from llm_runtime.supervisors.spec import ChildSpec
from llm_runtime.supervisors.status import StatValue
from llm_runtime.supervisors.wire import Channel


@dataclass(eq=False)
class Process:
    """One life of a child, from the request to fork it until it has been waited for. Times: monotonic seconds."""

    spec: ChildSpec
    incarnation: int
    log: Path
    channel: Channel
    started_at: float
    pid: int = 0
    pidfd: int = -1
    ready_at: float | None = None
    asked: bool = False
    """It was asked to stop, or killed for that."""
    stop_deadline: float | None = None
    killed: bool = False
    verdict: tuple[ExitKind, str] | None = None
    last_beat: float = 0.0
    doing: str = ""
    doing_since: float = 0.0
    stats: dict[str, StatValue] = field(default_factory=dict)
    ignored: bool = False
    said: str = ""
    traceback: str = ""
    ending: messages.Ending | None = None
    stored_fds: Iterator[tuple[messages.StoredFds, list[int]]] | None = None
    """What it is still to be given back."""

    def kill(self, verdict: tuple[ExitKind, str] | None = None) -> None:
        """SIGKILL, now or as soon as there is a pid; the first verdict stays."""
        if not self.killed:
            self.killed, self.verdict = True, verdict
        if self.pidfd >= 0:
            pidfd_kill(self.pidfd, signal.SIGKILL)

    def heard(self, message: messages.Up) -> None:
        """Keeps what the process says of itself. One past its own limit is killed as hung."""
        match message:
            case messages.Heartbeat():
                now = time.monotonic()
                self.last_beat, self.stats = now, message.stats
                self.doing, self.doing_since = message.doing, now - message.doing_s
                if message.limit_s is not None and message.doing_s > message.limit_s:
                    at = f"at {message.doing!r} for {message.doing_s:.1f} s, its limit is {message.limit_s:g} s"
                    self.kill(("hung", at))
            case messages.Ignore():
                self.ignored, self.said = True, message.reason
            case messages.Failed():
                self.said = message.reason
            case messages.Crash():
                self.traceback = message.traceback
            case messages.Ending():
                self.ending, self.said = message, message.text

    def limit(self) -> tuple[float, tuple[ExitKind, str]] | None:
        """By when (monotonic seconds) it is killed unless it does what it has to, and the verdict then."""
        if self.killed or self.pid == 0:
            return None  # the kernel's turn, or the zygote's
        spec = self.spec
        silence_s = spec.heartbeat_timeout_ms / 1000
        hung = self.last_beat + silence_s, _verdict("hung", f"no sign of life for {silence_s:g} s")
        if self.stop_deadline is not None:
            limit_s = (spec.shutdown_ms or 0) / 1000
            return min(hung, (self.stop_deadline, _verdict("killed", f"did not stop within {limit_s:g} s")))
        if self.silence_allowed:
            start_s = spec.start_timeout_ms / 1000
            late = self.started_at + start_s, _verdict("start_timeout", f"was not ready within {start_s:g} s")
            return min(hung, late)
        return hung

    @property
    def silence_allowed(self) -> bool:
        """A worker's start may keep the interpreter busy for long: until it is ready only a stopped one is hung."""
        return self.ready_at is None and self.spec.type == "worker"

    def overdue(self) -> tuple[ExitKind, str] | None:
        """The verdict on a process that is past its limit; None if it may go on."""
        limit, now = self.limit(), time.monotonic()
        if limit is None or now < limit[0]:
            return None
        if limit[1][0] == "hung" and self.silence_allowed and not is_stopped(self.pid):
            self.last_beat = now
            return None
        return limit[1]

    def reason(self, status: os.waitid_result | None, error: str) -> ExitReason:
        """Why it ended, from its wait status, or from why it could not be forked."""
        if status is None:
            return ExitReason(kind="shutdown" if self.asked else "error", text=error, when=time.time())
        return reason_of(
            status,
            asked=self.asked or (self.ending is not None and self.ending.ok),
            ready=self.ready_at is not None or self.ignored,
            verdict=self.verdict,
            said=self.said,
            traceback=self.traceback,
            log=self.log,
        )


def _verdict(kind: ExitKind, text: str) -> tuple[ExitKind, str]:
    return kind, text
