"""How a child ended, and the reports kept of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

import msgspec

ExitKind = Literal["normal", "shutdown", "killed", "signal", "error", "hung", "start_timeout"]

CRASHES_KEPT = 10
LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 8192


class ExitReason(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended.

    kind       normal: returned unasked; shutdown: stopped as asked; killed: by its supervisor, because it did not stop
               in time or stops by brutal_kill; signal: by a signal from elsewhere; error: exit code other than 0;
               hung: killed for silence or for a main loop past its limit; start_timeout: killed as not ready in time.
    code       exit code, None after a signal.
    signal     its name, such as "SIGKILL"; empty without one.
    text       one clause for people, such as "killed by SIGKILL".
    when       unix time in seconds.
    traceback  of the exception that ended it, if there was one.
    log_tail   its last log lines, oldest first.
    """

    kind: ExitKind
    code: int | None = None
    signal: str = ""
    text: str = ""
    when: float = 0.0
    traceback: str = ""
    log_tail: tuple[str, ...] = ()

    @property
    def abnormal(self) -> bool:
        """Whether a transient child would be restarted after it."""
        return self.kind not in ("normal", "shutdown")

    def brief(self) -> ExitReason:
        """The same without traceback and log lines."""
        return msgspec.structs.replace(self, traceback="", log_tail=())


class CrashReport(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of RUNDIR/crashes/ID.json: which life of the child ended, and how. Times in seconds."""

    id: str
    pid: int
    incarnation: int
    uptime_s: float
    doing: str
    reason: ExitReason


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9; "SIG40" for a real-time signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def reason_of(
    status: os.waitid_result,
    *,
    asked: bool,
    ready: bool,
    verdict: tuple[ExitKind, str] | None,
    said: str,
    traceback: str,
    log: Path,
) -> ExitReason:
    """The reason behind a wait status.

    asked    the supervisor had asked it to stop.
    ready    it had been ready.
    verdict  why the supervisor killed it, if it did.
    said     the child's own sentence about its failure.
    """
    signalled = status.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    code = None if signalled else status.si_status
    name = signal_name(status.si_status) if signalled else ""
    kind: ExitKind
    if verdict is not None:
        kind, text = verdict
    elif signalled:
        kind, text = "signal", f"killed by {name}"
    elif code != 0:
        last = traceback.strip().rpartition("\n")[2]
        kind, text = "error", said or last or f"exit code {code}"
    elif asked:
        kind, text = "shutdown", said or "stopped as asked"
    elif not ready:
        kind, text = "error", said or "ended with exit code 0 before it was ready"
    else:
        kind, text = "normal", "ended normally"
    unexpected = kind not in ("normal", "shutdown") and not asked
    return ExitReason(
        kind=kind,
        code=code,
        signal=name,
        text=text,
        when=time.time(),
        traceback=traceback,
        log_tail=log_tail(log) if unexpected else (),
    )


def log_tail(path: Path) -> tuple[str, ...]:
    """The last lines of a log file, at most LOG_TAIL_LINES; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-LOG_TAIL_LINES:])


def record_crash(run_dir: Path, report: CrashReport) -> None:
    """Adds a report to RUNDIR/crashes/ID.json, which keeps the last CRASHES_KEPT, oldest first. Raises OSError."""
    path = run_dir / "crashes" / f"{report.id}.json"
    reports = [*read_crashes(run_dir, report.id), report][-CRASHES_KEPT:]
    write_atomically(path, msgspec.json.format(msgspec.json.encode(reports), indent=2))


def read_crashes(run_dir: Path, name: str) -> list[CrashReport]:
    """The kept crash reports of a child, oldest first."""
    try:
        data = (run_dir / "crashes" / f"{name}.json").read_bytes()
        return msgspec.json.decode(data, type=list[CrashReport])
    except (OSError, msgspec.DecodeError):
        return []


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file so that a reader sees the old or the new content, never a part. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
