"""How log lines are written: as text, or one JSON object a line.

The choice is an environment variable, since it must reach processes that are forked and interpreters that are started
anew alike.
"""

from __future__ import annotations

import logging
import os
import time

import msgspec

VARIABLE = "RUNTIME_LOG_FORMAT"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_EXTRA = ("request", "request_id", "status")
"""What a log call may say beside the message, by its `extra`: the request that it is about, and the client's own name
for it."""


def is_json() -> bool:
    """Whether log lines are JSON."""
    return os.environ.get(VARIABLE) == "json"


def formatter(actor: str, incarnation: int) -> logging.Formatter:
    """What writes the lines of a process."""
    return JsonLines(actor, incarnation) if is_json() else logging.Formatter(TEXT)


def name_process(actor: str, incarnation: int) -> None:
    """Has the lines of this process say which actor it is."""
    for handler in logging.root.handlers:
        handler.setFormatter(formatter(actor, incarnation))


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
