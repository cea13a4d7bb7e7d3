"""What has happened to the processes of a node, for people: who ended, why, and how long it was away."""

from __future__ import annotations

import time
from collections import deque

from msgspec import Struct

from llm_runtime.supervisors.status import Event

KEPT = 100
_KEPT_KINDS = ("exit", "backoff", "gave_up", "zygote", "ignored")


class Happening(Struct, kw_only=True):
    """One entry.

    when     unix time in seconds.
    name     of the process; empty for the node as a whole.
    kind     of a supervisor's event: exit, backoff, gave_up, zygote, ignored; or node.
    text     a clause such as "killed by SIGKILL".
    crash    an end that nobody asked for.
    away_s   from an end until the process was ready again; None as long as it is not, and where nothing ended.
    """

    when: float
    name: str
    kind: str
    text: str
    crash: bool = False
    away_s: float | None = None


class Happenings:
    """The last ones of a node."""

    def __init__(self) -> None:
        self._kept: deque[Happening] = deque(maxlen=KEPT)
        self._away: dict[str, Happening] = {}

    def add(self, event: Event) -> None:
        """Takes in what a supervisor says."""
        if event.kind == "ready" and (ended := self._away.pop(event.id, None)) is not None:
            ended.away_s = max(0.0, event.when - ended.when)
        if event.kind not in _KEPT_KINDS:
            return
        entry = Happening(when=event.when, name=event.id, kind=event.kind, text=event.text, crash=event.crash)
        self._kept.append(entry)
        if event.kind == "exit":
            self._away.setdefault(event.id, entry)

    def note(self, text: str) -> None:
        """Adds something that concerns the whole node."""
        self._kept.append(Happening(when=time.time(), name="", kind="node", text=text))

    def latest(self) -> list[Happening]:
        """All that are kept, oldest first."""
        return list(self._kept)
