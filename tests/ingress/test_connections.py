"""Connections that have no request, those that are too many, and the end of a server."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import eventually

from .conftest import Serve
from .fakes import answer
from .test_survival import TOKENS, Response, Tree, half_done, request

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

Grow = Callable[..., Tree]


@pytest.fixture
def grow(tmp_path: Path) -> Iterator[Grow]:
    trees: list[Tree] = []

    def start(**arguments: Any) -> Tree:
        trees.append(Tree(tmp_path, **arguments))
        return trees[-1]

    yield start
    for tree in trees:
        tree.close()


def test_connections_without_a_request_take_no_protection(grow: Grow) -> None:
    """They survive a kill themselves, whether they have had a request or none yet."""
    tree = grow(slots=2)
    tree.fakes.step_s = 0.004
    used = [tree.connect() for _ in range(40)]
    fresh = [socket.create_connection(("127.0.0.1", tree.port)) for _ in range(40)]
    eventually(lambda: tree.figure("actor_connections_open") >= 81, "all connections")
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(request(prompt="a", stream=True))
        for _ in range(3):
            half_done(tree)
            tree.kill()
        assert Response(file).text() == answer("a", 1, TOKENS)
    assert tree.figure("connections_lost") == 0
    for each in (*used, *fresh):
        each.settimeout(20)
        each.sendall(request(prompt="b", max_tokens=3))
        with each, each.makefile("rb") as file:
            assert Response(file).text() == answer("b", 1, 3)
    assert tree.figure("connections_unprotected") == 0


def test_requests_that_are_half_sent_take_no_protection_from_whole_ones(grow: Grow) -> None:
    tree = grow(slots=2)
    tree.fakes.step_s = 0.004
    whole = request(prompt="a", stream=True)
    halves = [whole[:5], whole[: len(whole) // 2], whole[:-1]] * 4
    clients = [tree.connect() for _ in halves]
    for client, half in zip(clients, halves, strict=True):
        client.sendall(half)
    eventually(lambda: tree.figure("connections_unprotected") >= len(halves) - 2, "what was half sent")
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(whole)
        half_done(tree)
        tree.kill()
        assert Response(file).text() == answer("a", 1, TOKENS)
    for client in clients:
        client.close()


def test_an_unprotected_request_and_the_next_one_on_its_connection(grow: Grow) -> None:
    """Protection comes back with the next request."""
    tree = grow(slots=1)
    tree.fakes.step_s = 0.004
    with tree.connect() as first, tree.connect() as second, second.makefile("rb") as file:
        first.sendall(request(prompt="a", stream=True))
        half_done(tree)
        second.sendall(request(prompt="b", max_tokens=5))
        assert Response(file).text() == answer("b", 1, 5)
        with first.makefile("rb") as of_first:
            assert Response(of_first).text() == answer("a", 1, TOKENS)
        assert tree.figure("connections_unprotected") >= 1
        ended = len(tree.fakes.seen.acknowledged)
        second.sendall(request(prompt="c", stream=True))
        half_done(tree, ended=ended)
        tree.kill()
        assert Response(file).text() == answer("c", 1, TOKENS)


def ask(connection: socket.socket) -> int:
    """The status of the answer to a request, 0 if the connection was refused without one."""
    try:
        connection.settimeout(20)
        connection.sendall(GET)
        reply = connection.recv(4096)
    except ConnectionError:
        return 0
    return int(reply.split()[1]) if reply else 0


def test_more_connections_than_descriptors(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.004

    def descriptors(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    tree.figure("actor_connections_open")
    before = descriptors(tree.pids["ingress0"])
    with tree.connect() as one, tree.connect() as other:
        eventually(lambda: descriptors(tree.pids["ingress0"]) <= before + 2, "one descriptor a connection")
        assert ask(one) == ask(other) == 200
    limit = 3 * before
    for pid in (tree.process.pid, tree.pids["ingress0"]):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
    stream = tree.connect()
    stream.sendall(request(prompt="a", stream=True))
    for _ in range(2):
        clients = [socket.create_connection(("127.0.0.1", tree.port)) for _ in range(limit + 50)]
        statuses = [ask(client) for client in clients]
        assert statuses.count(200) >= before // 2
        assert statuses.count(503) >= 10
        assert set(statuses) <= {0, 200, 503}
        for client in clients:
            client.close()
        eventually(lambda: tree.figure("actor_connections_open") <= 2, "room")
        with tree.connect() as connection:
            assert ask(connection) == 200
    tree.kill()
    with stream, stream.makefile("rb") as file:
        assert Response(file).text() == answer("a", 1, TOKENS)
    assert tree.ready["ingress0"] == 2
    assert tree.figure("connections_refused") >= 0


def test_a_server_that_drains_says_so(serve: Serve) -> None:
    served = serve(drain_s=30)
    served.fakes.step_s = 0.02
    stream: list[str] = []

    def read() -> None:
        body = {**CHAT, "max_tokens": 60, "stream": True}
        stream.append(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).text)

    with httpx.Client(base_url=served.url) as kept:
        assert kept.get("/health").status_code == 200
        thread = threading.Thread(target=read)
        thread.start()
        eventually(lambda: served.fakes._running, "the stream")
        served.fakes.frozen = True
        served.request_shutdown()
        eventually(lambda: httpx.get(f"{served.url}/health").status_code == 503, "the draining")
        for path, body in (("/health", None), ("/v1/models", None), ("/v1/chat/completions", CHAT), ("/api/chat", {})):
            for client in (httpx, served.client, kept):
                url = served.url + path
                response = client.get(url) if body is None else client.post(url, json=body)
                assert response.status_code == 503
                assert response.headers["connection"] == "close"
                assert response.headers["retry-after"] == "1"
                assert "draining" in response.text
        assert httpx.get(f"{served.url}/metrics").status_code == 200
        idle = socket.create_connection(("127.0.0.1", served.port))
        served.fakes.frozen = False
        thread.join(30)
    assert stream[0].endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in stream[0]
    assert served.process.wait(20) == 0, "nobody waits for a connection that asks nothing"
    idle.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_let_answers_end(grow: Grow, number: int) -> None:
    tree = grow(drain_s=4)
    tree.fakes.step_s = 0.005
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(request(prompt="a", stream=True, max_tokens=150))
        half_done(tree)
        os.kill(tree.process.pid, number)
        assert Response(file).text() == answer("a", 1, 150)
    tree.process.wait(20)


def test_engines_are_asked_once_for_all_who_ask_for_their_health(serve: Serve) -> None:
    served = serve()
    served.fakes.step_s = 0.05
    statuses: list[int] = []
    asking = [
        threading.Thread(target=lambda: statuses.append(httpx.get(f"{served.url}/health_generate").status_code))
        for _ in range(30)
    ]
    began = time.monotonic()
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(30)
    assert statuses == [200] * 30
    assert len(served.fakes.seen.generates) <= 2 + time.monotonic() - began
    asked = len(served.fakes.seen.generates)

    def asked_again() -> bool:
        assert served.client.get("/health_generate").status_code == 200
        return len(served.fakes.seen.generates) > asked

    eventually(asked_again, "a new question after a second")


KEYS = {"api_key": "client", "admin_api_key": "admin"}


@pytest.mark.parametrize("with_clients_key", [True, False])
def test_the_administrators_key(serve: Serve, with_clients_key: bool) -> None:
    served = serve(**{key: value for key, value in KEYS.items() if with_clients_key or key != "api_key"})
    as_admin = {"Authorization": "Bearer admin"}
    eventually(lambda: served.client.get("/get_load", headers=as_admin).json(), "an engine")

    def status(key: str, path: str, body: Any = None, method: str = "POST") -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return served.client.request(method, path, json=body, headers=headers).status_code

    for path, body in (
        ("/flush_cache", None),
        ("/start_profile", {}),
        ("/stop_profile", {}),
        ("/abort_request", {"abort_all": True}),
    ):
        assert status("", path, body) == 401
        assert status("wrong", path, body) == 401
        assert status("client", path, body) == (403 if with_clients_key else 401)
        if "profile" not in path:
            assert status("admin", path, body) == 200
    assert status("client", "/flush_cache", method="GET") == (403 if with_clients_key else 401)
    for key in ("client", "admin"):
        assert status(key, "/v1/chat/completions", CHAT) == 200
        assert status(key, "/abort_request", {"rid": "x"}) == 200
    assert status("", "/v1/chat/completions", CHAT) == (401 if with_clients_key else 200)


def test_one_key_is_for_all(serve: Serve) -> None:
    served = serve(api_key="client")
    eventually(lambda: served.client.get("/get_load", headers={"x-api-key": "client"}).json(), "an engine")
    for key, expected in (("client", 200), ("wrong", 401)):
        for path, body in (("/flush_cache", None), ("/abort_request", {"abort_all": True})):
            response = served.client.post(path, json=body, headers={"x-api-key": key})
            assert response.status_code == expected
    assert json.loads(response.text)["error"]["code"] == "invalid_api_key"
    assert served.client.get("/v1/models", headers={"Origin": "null", "x-api-key": "client"}).status_code == 200
