"""`runtime replay`: send the requests of a crash dump again."""

from __future__ import annotations

import argparse
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_runtime.runtime.api_keys import key_from
from llm_runtime.runtime.cli.options import add_node
from llm_runtime.runtime.cli.output import say
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import find_node, read_info

_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class _Request:
    name: str
    path: str
    body: bytes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of `node.crash_dump_dir`")
    parser.add_argument("--url", metavar="URL", help="the server to ask; by default the running node")
    parser.add_argument("--all", action="store_true", help="also those that were not in progress at the crash")
    parser.add_argument(
        "--concurrency", metavar="N", type=int, default=8, help="how many to send at a time (default: 8)"
    )
    add_node(parser)
    parser.epilog = (
        "The API key, if there is one, is taken from $RUNTIME_API_KEY.\n\n"
        "example:\n  runtime replay crashes/crash-20260101-120000-000000000-ingress0.jsonl --url http://127.0.0.1:8000"
    )


def run(options: argparse.Namespace) -> int:
    if not 1 <= options.concurrency <= 1024:
        raise UserError(f"--concurrency is {options.concurrency}; give a number from 1 to 1024")
    requests = list(_read(options.file, options.all))
    url = urllib.parse.urlsplit(options.url or _url_of_node(options.node))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"--url is {options.url}; give one such as http://127.0.0.1:8000")
    failures = 0
    with ThreadPoolExecutor(options.concurrency) as pool:
        outcomes = pool.map(partial(_send, url), requests)
        for request, (problem, seconds) in zip(requests, outcomes, strict=True):
            failures += bool(problem)
            say(f"{request.name} {request.path} {problem or 'ok'} ({seconds:.2f} s)")
    say(f"{len(requests)} requests sent, {failures} failed")
    return 1 if failures else 0


def _read(file: Path, every: bool) -> Iterator[_Request]:
    """The requests of a dump. Raises UserError if it is none."""
    try:
        with file.open("rb") as lines:
            if "deaths" not in json.loads(next(lines, b"")):
                raise ValueError("its first line tells of no crash")
            for line in lines:
                entry: dict[str, Any] = json.loads(line)
                if every or entry["in_flight"]:
                    yield _Request(str(entry["request_id"]), str(entry["path"]), json.dumps(entry["body"]).encode())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a file of `node.crash_dump_dir` ({error})") from None


def _url_of_node(node: str | None) -> str:
    info = read_info(find_node(node))
    if info is None or not info.url:
        raise UserError("the node has no ingress: give --url")
    return info.url


def _send(url: urllib.parse.SplitResult, request: _Request) -> tuple[str, float]:
    """What went wrong, empty if nothing did, and how long it took."""
    headers = {"Content-Type": "application/json", "X-Request-Id": request.name}
    if key := key_from("RUNTIME_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    assert url.hostname is not None
    began = time.monotonic()
    connection = kind(url.hostname, url.port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", url.path.rstrip("/") + request.path, request.body, headers)
        answer = connection.getresponse()
        text = answer.read()
        problem = "" if answer.status == 200 else f"status {answer.status}: {text[:200].decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        problem = f"no answer: {error or type(error).__name__}"
    finally:
        connection.close()
    return problem, time.monotonic() - began
