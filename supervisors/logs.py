"""Where log lines are written and how: as text, or one JSON object a line.

The choice is an environment variable, since it must reach processes that are forked and interpreters that are started
anew alike.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec

VARIABLE = "RUNTIME_LOG_FORMAT"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_EXTRA = ("request", "request_id", "status")
"""What a log call may say beside the message, by its `extra`: the request that it is about, and the client's own name
for it."""


ROTATE_BYTES = 16 * 1024 * 1024
"""A log of more bytes is renamed to `NAME.log.1`, and a new one begins."""


class LogFile(io.RawIOBase):
    """A log as a stream that never fails: nobody should end because a line for people cannot be written.

    What cannot be written is counted, and the log says so as soon as it takes lines again. The log is rotated while it
    is written, and made anew when somebody has removed it.

    Args:
        descriptors: numbers under which the log is open too, such as 1 and 2: native libraries write there.
    """

    def __init__(self, path: Path, descriptors: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._path = path
        self._descriptors = descriptors
        self._lock = threading.Lock()
        self._lost_bytes = 0
        self._fd = -1
        self._on_nothing = False
        """What is open is /dev/null, for the log cannot be opened."""
        try:
            self._open()
        except OSError:
            self._lost(0)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        """Takes all of it, whatever becomes of it."""
        with self._lock:
            rest = memoryview(data).cast("B")
            size = rest.nbytes
            try:
                status = None if self._fd < 0 or self._on_nothing else os.fstat(self._fd)
                if status is None or status.st_nlink == 0 or status.st_size >= ROTATE_BYTES:
                    self._open()
                if self._lost_bytes:
                    os.write(self._fd, f"({self._lost_bytes} bytes of this log could not be written)\n".encode())
                    self._lost_bytes = 0
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError:
                self._lost(rest.nbytes)
        return size

    def _open(self) -> None:
        """Opens the log, a new one if the present one is long. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            if self._path.stat().st_size >= ROTATE_BYTES:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        except OSError:
            pass  # there is none, or it cannot be renamed: then it grows
        self._take(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._on_nothing = False

    def _take(self, fd: int) -> None:
        """Puts `fd` in the place of what was open."""
        if self._descriptors:
            for target in self._descriptors:
                os.dup2(fd, target)
            os.close(fd)
            self._fd = self._descriptors[0]
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def _lost(self, size: int) -> None:
        self._lost_bytes += size
        if self._fd < 0:
            self._take(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
            self._on_nothing = True


def open_log(path: Path, descriptors: tuple[int, ...] = ()) -> TextIO:
    """A log as a text stream, written line by line; see `LogFile`."""
    raw = LogFile(path, descriptors)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)


def is_json() -> bool:
    """Whether log lines are JSON."""
    return os.environ.get(VARIABLE) == "json"


def formatter(actor: str, incarnation: int) -> logging.Formatter:
    """What writes the lines of a process."""
    return JsonLines(actor, incarnation) if is_json() else TextLines(TEXT)


def name_process(actor: str, incarnation: int) -> None:
    """Has the lines of this process say which actor it is."""
    for handler in logging.root.handlers:
        handler.setFormatter(formatter(actor, incarnation))


def one_line(text: str) -> str:
    """A text with its control characters and line ends as escapes. Clients' words stand in messages: they must not make
    lines of their own, nor tell a terminal what to do."""
    return text.translate(_ESCAPES)


_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(10, 32), *range(127, 160))}
_ESCAPES |= {0x2028: "\\u2028", 0x2029: "\\u2029"}


class TextLines(logging.Formatter):
    """A line of text a record, and those of an exception below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


class JsonLines(logging.Formatter):
    """One JSON object a record: time (UTC, ISO 8601), level, actor, incarnation, logger, message, and `exception`,
    `request` and `request_id` where there are any."""

    def __init__(self, actor: str, incarnation: int) -> None:
        super().__init__()
        self._who = {"actor": actor, "incarnation": incarnation}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.created % 1 * 1e6):06d}Z",
            "level": record.levelname.lower(),
            **self._who,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
