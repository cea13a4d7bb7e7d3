"""The requests of the last minutes, to be written down when an actor crashes, so that they can be sent again."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llm_runtime.actors.ingress.exchange import Exchange

logger = logging.getLogger(__name__)

KEPT_S = 300.0
MAX_KEPT = 2000
MAX_KEPT_BYTES = 64 * 2**20
"""Of requests that have been answered. How many are in progress is limited elsewhere."""
MAX_FILES = 20
MAX_FILE_BYTES = 256 * 2**20
SETTLE_S = 1.0
"""Actors that die together are told of in one file."""
_REMOTE = "tcp://"
_NOT_REPLAYED = {
    *("/abort_request", "/start_profile", "/stop_profile", "/tokenize", "/detokenize", "/api/show"),
    "/v1/messages/count_tokens",
}


class Record(msgspec.Struct):
    """A request as it came. Times: seconds since 1970; `ended_at` is 0 while it is in progress."""

    request_id: str
    rid: str
    path: str
    body: bytes
    arrived_at: float
    ended_at: float = 0.0
    status: int = 0


class Death(msgspec.Struct, frozen=True):
    """An actor that has crashed: which of its lives, how, and when (seconds since 1970)."""

    actor: str
    incarnation: int
    reason: str
    when: float


class RecentRequests:
    """Requests in progress in this worker and those that ended lately, and the files that are written of them.

    Args:
        directory: where files go.
        crashes: where supervisors of this machine keep crash reports: an actor that was stopped in order has none.
        worker: this ingress worker's name.
        peers: addresses of the other actors, by their names.
    """

    def __init__(self, directory: Path, crashes: Path, worker: str, peers: Mapping[str, str]) -> None:
        self._directory = directory
        self._crashes = crashes
        self._worker = worker
        self._peers = peers
        self._running: dict[str, Record] = {}
        self._ended: deque[Record] = deque()
        self._ended_bytes = 0
        self._incarnations: dict[str, int] = {}

    def begin(self, exchange: Exchange, body: bytes) -> None:
        """Keeps a request that has been read."""
        path, identity = exchange.scope["path"], exchange.work.identity
        if path in _NOT_REPLAYED:
            return
        arrived_at = time.time() - (time.monotonic() - identity.arrived_at)
        self._running[identity.rid] = Record(exchange.request_id, identity.rid, path, body, arrived_at)

    def end(self, exchange: Exchange) -> None:
        """The request has been answered; it is kept for a while."""
        record = self._running.pop(exchange.work.identity.rid, None)
        if record is None:
            return
        record.ended_at, record.status = time.time(), exchange.status
        self._ended.append(record)
        self._ended_bytes += len(record.body)
        while self._ended and (
            len(self._ended) > MAX_KEPT
            or self._ended_bytes > MAX_KEPT_BYTES
            or self._ended[0].ended_at < record.ended_at - KEPT_S
        ):
            self._ended_bytes -= len(self._ended.popleft().body)

    def started(self, actor: str, incarnation: int) -> int | None:
        """Notes the incarnation of an actor; which one it has followed, None if none is known."""
        former = self._incarnations.get(actor)
        self._incarnations[actor] = incarnation
        return former if former is not None and former < incarnation else None

    def deaths(self, suspects: Mapping[str, int]) -> list[Death]:
        """Who of these actors, given with the last incarnation before the present one, has crashed."""
        found = []
        for actor, incarnation in suspects.items():
            if self._peers.get(actor, "").startswith(_REMOTE):
                found.append(Death(actor, incarnation, "started anew on another machine", time.time()))
                continue
            try:
                reports = msgspec.json.decode((self._crashes / f"{actor}.json").read_bytes())
                last = reports[-1]
                if last["incarnation"] >= incarnation:
                    reason = last["reason"]
                    found.append(Death(actor, last["incarnation"], reason["text"], reason["when"]))
            except (OSError, msgspec.DecodeError, LookupError, TypeError):
                continue
        return found

    def snapshot(self) -> list[Record]:
        """All requests that are kept, by arrival."""
        oldest = time.time() - KEPT_S
        records = [*(each for each in self._ended if each.ended_at >= oldest), *self._running.values()]
        return sorted((msgspec.structs.replace(each) for each in records), key=lambda each: each.arrived_at)

    def write(self, deaths: Sequence[Death], records: Sequence[Record]) -> Path:
        """Writes a file, readable by its owner alone: a line about the deaths, and one for each request.

        Takes a while and changes nothing here: for a thread. Raises OSError.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = self._directory / f"crash-{stamp}-{time.time_ns() % 10**9:09d}-{self._worker}.jsonl"
        died_at = min(death.when for death in deaths)
        head = {"deaths": deaths, "worker": self._worker, "requests": len(records)}
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(head) + b"\n")
            for record in records:
                line = msgspec.json.encode(_document(record, died_at)) + b"\n"
                if file.tell() + len(line) > MAX_FILE_BYTES:
                    break
                file.write(line)
        for old in sorted(self._directory.glob("crash-*.jsonl"))[:-MAX_FILES]:
            old.unlink(missing_ok=True)
        return path


def _document(record: Record, died_at: float) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "rid": record.rid,
        "path": record.path,
        "arrived_at": record.arrived_at,
        "ended_at": record.ended_at,
        "status": record.status,
        "in_flight": record.arrived_at <= died_at and (not record.ended_at or record.ended_at >= died_at),
        "body": msgspec.Raw(msgspec.json.format(record.body, indent=-1)),
    }
