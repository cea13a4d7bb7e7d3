"""What the status page shows: the processes, their logs, figures over time, requests in progress; and its buttons.

All of it asks for a key where there is one. What shows texts of clients or changes something is for administrators.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import msgspec
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import ApiError, invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.history import NAMES, WINDOW
from llm_runtime.actors.ingress.ledger import Entry
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import MAX_LISTED, EngineInfo, RequestInfo, RequestsListed

ANSWER_TIMEOUT_S = 2.0
RESTART_TIMEOUT_S = 120.0
FRESH_S = 0.2
"""A tree is told again to others who ask within so many seconds."""
MAX_LOG_LINES = 1000
MAX_LOG_BYTES = 256 * 1024

_ACTOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_encode = msgspec.json.encode


class RestartBody(Struct, forbid_unknown_fields=True):
    """Body of POST /status/restart: one process with all below it, or all of the node one after the other."""

    actor: Annotated[str, Meta(max_length=100)] = ""
    rolling: bool = False


class NodeStatus:
    """GET /status: the node, its tree and what has happened, as `runtime status --json` prints them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._told_at = 0.0
        self._told = b""

    async def __call__(self, service: Service, exchange: Exchange) -> None:
        """Raises ApiError when the node cannot be asked."""
        async with self._lock:
            if time.monotonic() - self._told_at > FRESH_S:
                self._told = await _ask(service, "status", ANSWER_TIMEOUT_S)
                self._told_at = time.monotonic()
        await exchange.answer(self._told)


async def history(service: Service, exchange: Exchange) -> None:
    """GET /status/history?since=TIME: the last ten minutes' figures, and each engine's present ones."""
    since = _number_asked(exchange, "since", 0.0)
    past = service.history
    document = {
        "now": time.time(),
        "names": NAMES,
        "points": past.points(since),
        "window_s": WINDOW,
        "times": past.times(),
        "responses": past.responses(),
        "engines": [_engine(service, info) for info in service.ledger.engines.infos],
        "models": [model.name for model in service.models],
    }
    await exchange.answer(_encode(document))


async def requests(service: Service, exchange: Exchange) -> None:
    """GET /status/requests: what is in progress in all workers, the oldest first."""
    elsewhere, silent = await service.control.list_elsewhere()
    listed = [requests_of(service, ""), *elsewhere]
    every = sorted((each for one in listed for each in one.requests), key=lambda each: -each.age_s)
    document = {
        "total": sum(one.total for one in listed),
        "requests": [msgspec.structs.asdict(each) for each in every[:MAX_LISTED]],
        "silent_workers": silent,
    }
    await exchange.answer(_encode(document))


def requests_of(service: Service, rid: str) -> RequestsListed:
    """The requests in progress in this worker; `rid` is that of the question."""
    entries: dict[str, list[Entry]] = {}
    for entry in service.ledger.live.values():
        entries.setdefault(entry.rid.partition("/")[0], []).append(entry)
    oldest = sorted(service.in_progress, key=lambda each: each.work.identity.arrived_at)
    infos = [_request(service, each, entries.get(each.work.identity.rid, [])) for each in oldest[:MAX_LISTED]]
    return RequestsListed(rid or "0", len(oldest), infos)


def _request(service: Service, exchange: Exchange, entries: list[Entry]) -> RequestInfo:
    now = time.monotonic()
    arrived_at = exchange.work.identity.arrived_at
    return RequestInfo(
        exchange.work.identity.rid,
        exchange.request_id,
        exchange.scope["path"],
        exchange.model,
        service.name,
        round(max(0.0, now - arrived_at), 3),
        round(max(0.0, now - max((each.progressed_at for each in entries), default=arrived_at)), 3),
        len(entries),
        sum(each.prompt_tokens for each in entries),
        sum(len(each.output) for each in entries),
        sorted({each.scheduler for each in entries if each.scheduler is not None}),
        max((each.attempt for each in entries), default=0),
    )


async def actor_log(service: Service, exchange: Exchange) -> None:
    """GET /status/logs?actor=NAME&lines=N: the end of a process's log on this machine. Raises ApiError without one."""
    query = _query(exchange)
    actor = query.get("actor", "")
    lines = int(_number_asked(exchange, "lines", 200))
    if not 1 <= lines <= MAX_LOG_LINES:
        raise invalid(f"Invalid value for 'lines': it must be 1 to {MAX_LOG_LINES}.", "lines", "invalid_value")
    if not service.config.status_socket:
        raise ApiError(404, "This server does not know the processes of its node.")
    if not _ACTOR.fullmatch(actor):
        raise invalid("Invalid value for 'actor': give the name of a process, as /status tells it.", "actor")
    path = Path(service.config.status_socket).with_name("logs") / f"{actor}.log"
    try:
        text = await asyncio.to_thread(_end_of, path)
    except OSError:
        raise ApiError(404, f"There is no log of '{actor}' on this machine.", "actor") from None
    await exchange.answer(_encode({"actor": actor, "lines": text.splitlines()[-lines:]}))


def _end_of(path: Path) -> str:
    """The last bytes of a file that is no link, from the beginning of a line. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES)
        file.seek(start)
        data = file.read(MAX_LOG_BYTES)
    return (data.partition(b"\n")[2] if start else data).decode("utf-8", "replace")


async def restart(service: Service, body: RestartBody, exchange: Exchange) -> None:
    """Answers when the process is ready again, or the rolling restart has begun. Raises ApiError where that fails."""
    if bool(body.actor) == body.rolling:
        raise invalid("Send either 'actor' or rolling = true.", "actor")
    # A restart of this very worker ends it. Its next incarnation gets the request again, and must not repeat it.
    if not exchange.work.is_continued:
        if body.actor and not _ACTOR.fullmatch(body.actor):
            raise invalid("Invalid value for 'actor': give the name of a process, as /status tells it.", "actor")
        line = "rolling" if body.rolling else f"restart {body.actor}"
        answer: dict[str, Any] = msgspec.json.decode(await _ask(service, line, RESTART_TIMEOUT_S))
        if error := str(answer.get("error") or ""):
            raise ApiError(409, error[:1].upper() + error[1:].rstrip(".") + ".", code="not_restarted")
    await exchange.answer(b"{}")


async def _ask(service: Service, line: str, timeout_s: float) -> bytes:
    """The node's answer. Raises ApiError when there is none in time."""
    path = service.config.status_socket
    if not path:
        raise ApiError(404, "This server does not know the processes of its node.")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(f"{line}\n".encode())
                answer = await reader.read()
            finally:
                writer.close()
        msgspec.json.decode(answer)  # all of it
    except (OSError, TimeoutError, msgspec.DecodeError):
        raise ApiError(503, "The node does not say what its processes do.", retry_after_s=1.0) from None
    return answer


def _engine(service: Service, info: EngineInfo) -> dict[str, Any]:
    figures = service.actors.since(time.monotonic() - 3.0).get(info.scheduler)
    names = ("num_running_reqs", "num_queue_reqs", "num_used_tokens", "max_total_num_tokens", "gen_throughput")
    more = ("cache_hit_rate", "retractions", "spec_accept_length", "num_grammar_queue_reqs")
    return {
        "engine": info.engine,
        "role": info.role,
        "model": info.model,
        "scheduler": info.scheduler,
        "tp": info.tp,
        "figures": None if figures is None else {name: figures[name] for name in names + more if name in figures},
    }


def _query(exchange: Exchange) -> dict[str, str]:
    parsed = parse_qs(exchange.scope["query_string"].decode("latin-1"))
    return {name: values[-1] for name, values in parsed.items()}


def _number_asked(exchange: Exchange, name: str, default: float) -> float:
    """A number in the query. Raises ApiError for another text."""
    text = _query(exchange).get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
        raise invalid(f"Invalid value for '{name}': it must be a number.", name, "invalid_value")
    return float(text)
