"""The socket by which the ingress learns what a node does, and what the node remembers of its processes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_runtime.runtime.happenings import KEPT, Happenings
from llm_runtime.runtime.status_socket import MAX_READERS, NAME, Reply, StatusSocket
from llm_runtime.supervisors.loop import Loop
from llm_runtime.supervisors.status import Event

POLL_S = 5.0


class Node:
    """Answers `later` when told to, and all else by repeating it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.loop = Loop()
        self.later: list[Reply] = []
        self.socket = StatusSocket(directory, self.loop, self._answer)
        self.loop.watch(self.socket.fd, self.socket.serve)

    def _answer(self, line: str, reply: Reply) -> None:
        if line == "later":
            self.later.append(reply)
        else:
            reply({"line": line})

    def connect(self, data: bytes) -> socket.socket:
        reader = socket.socket(socket.AF_UNIX)
        reader.settimeout(POLL_S)
        reader.connect(str(self.path))
        reader.sendall(data)
        self.loop.poll(POLL_S)
        return reader

    def poll(self) -> None:
        self.loop.poll(POLL_S)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.socket.close()
    node.loop.close()


def told(reader: socket.socket) -> Any:
    with reader, reader.makefile() as file:
        return json.load(file)


def test_a_line_has_an_answer(node: Node) -> None:
    reader = node.connect(b"restart a\n")
    node.poll()
    assert told(reader) == {"line": "restart a"}
    assert node.path.stat().st_mode & 0o777 == 0o600


def test_a_line_in_pieces_and_none(node: Node) -> None:
    reader = node.connect(b"sta")
    node.poll()
    reader.sendall(b"tus\nmore")
    node.poll()
    assert told(reader) == {"line": "status"}
    silent = node.connect(b"")
    silent.shutdown(socket.SHUT_WR)
    node.poll()
    assert told(silent) == {"line": "status"}


def test_who_waits_holds_nobody_up(node: Node) -> None:
    waiting = node.connect(b"later\n")
    node.poll()
    other = node.connect(b"status\n")
    node.poll()
    assert told(other) == {"line": "status"}
    node.later.pop()({"done": True})
    assert told(waiting) == {"done": True}


def test_long_lines_and_many_readers_are_dropped(node: Node) -> None:
    long = node.connect(b"x" * 300)
    node.poll()
    node.poll()
    assert long.recv(1) == b""
    readers = [node.connect(b"") for _ in range(MAX_READERS + 1)]
    assert readers[0].recv(1) == b""
    node.later.append(lambda document: None)
    readers[-1].sendall(b"status\n")
    node.poll()
    assert told(readers[-1]) == {"line": "status"}
    for reader in (*readers, long):
        reader.close()


def happened(kind: Any, when: float, name: str = "a", text: str = "", crash: bool = False) -> Event:
    return Event(kind=kind, id=name, text=text, when=when, crash=crash)


def test_how_long_a_process_was_away() -> None:
    happenings = Happenings()
    add: Callable[[Event], None] = happenings.add
    add(happened("ready", 1.0))
    add(happened("exit", 2.0, text="killed by SIGKILL", crash=True))
    assert happenings.latest()[0].away_s is None
    add(happened("starting", 2.1))
    add(happened("exit", 2.2, text="exit code 1", crash=True))
    add(happened("backoff", 2.2))
    add(happened("ready", 5.0))
    first, second, backoff = happenings.latest()
    assert (first.text, first.crash, first.away_s) == ("killed by SIGKILL", True, 3.0)
    assert (second.away_s, backoff.kind) == (None, "backoff")
    add(happened("exit", 6.0))
    add(happened("ready", 6.5))
    assert happenings.latest()[-1].away_s == 0.5
    for i in range(2 * KEPT):
        happenings.note(str(i))
    assert len(happenings.latest()) == KEPT
