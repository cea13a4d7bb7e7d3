"""Clients that do not do their part lose their connection: the server's times, made short."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from support import eventually

from llm_runtime.actors.ingress import connection, exchange, socket_transport
from llm_runtime.actors.ingress.server import Server

SHORT_S = 0.3
LONG_S = 60.0
MAX_BODY = 2**20
LARGE = 2**23
"""More than the kernel takes for a client that does not read."""

HEAD = b"POST /%b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at /read with what it has read, elsewhere without reading."""

    async def work(exchange: exchange.Exchange) -> None:
        body = await exchange.body(msgspec.json.Decoder(Any), MAX_BODY) if scope["path"] == "/read" else 0
        await exchange.answer(bytes(LARGE) if scope["path"] == "/large" else msgspec.json.encode(body))

    await exchange.Exchange(scope, receive, send).run(work)


class Running:
    """A server in a thread, without actors."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        link = SimpleNamespace(store_fd=lambda *_: None, remove_fd=lambda _: None)
        context: Any = SimpleNamespace(link=link, incarnation=1, stored_fds={})
        counters = dict.fromkeys(("connections_unprotected", "connections_refused", "connections_resumed"), 0)
        config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1)
        self._server = Server(config, listener, None, context, counters)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def abort_stalled(self, limit_s: float) -> None:
        self._server._loop.call_soon_threadsafe(self._server.abort_stalled, limit_s)

    def waiting(self) -> list[int]:
        """Bytes that wait to be sent, of each connection."""
        return [each.transport.get_write_buffer_size() for each in self._server._connections()]

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(20)
        return client

    def drip(self, client: socket.socket, first: bytes, drop: bytes) -> bytes:
        """Sends something again and again until the server ends the connection; what it has answered."""
        reply = b""
        client.settimeout(SHORT_S / 20)
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            client.sendall(first)
            while time.monotonic() < deadline:
                client.sendall(drop)
                with contextlib.suppress(TimeoutError):
                    if not (data := client.recv(65536)):
                        return reply
                    reply += data
        assert time.monotonic() < deadline, "it is still open"
        return reply


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    for module, name in (
        (connection, "HEADER_TIMEOUT_S"),
        (connection, "DISCARD_TIMEOUT_S"),
        (exchange, "BODY_CHUNK_TIMEOUT_S"),
        (exchange, "BODY_TIMEOUT_S"),
    ):
        monkeypatch.setattr(module, name, LONG_S)
    monkeypatch.setattr(exchange, "SLOWEST_BYTES_PER_S", 2**30)
    server = Running()
    yield server
    server.stop()


@pytest.mark.parametrize("first", [b"", b"G", b"POST /read HTTP/1.1\r\nhost: x\r\n", b"\r\n"])
def test_headers_that_do_not_come(running: Running, monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", SHORT_S)
    with running.connect() as client:
        client.sendall(first)
        assert client.recv(1) == b""


def test_headers_that_come_slowly(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a second request."""
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", SHORT_S)
    with running.connect() as client:
        assert running.drip(client, HEAD % b"read", b"a: b\r\n") == b""
    with running.connect() as client:
        client.sendall(HEAD % b"read" + b"content-length: 1\r\n\r\n7")
        assert client.recv(65536).endswith(b"7")
        assert running.drip(client, HEAD % b"read", b"a: b\r\n") == b""


def test_a_body_that_stops(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_CHUNK_TIMEOUT_S", SHORT_S)
    with running.connect() as client:
        client.sendall(HEAD % b"read" + b"content-length: 9\r\n\r\n1")
        assert client.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert client.recv(1) == b""


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_that_comes_slowly(running: Running, monkeypatch: pytest.MonkeyPatch, framing: str) -> None:
    """However steadily: the whole of it has its time."""
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", SHORT_S)
    chunked = framing == "chunks"
    first = HEAD % b"read" + (b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: 100000\r\n\r\n")
    with running.connect() as client:
        assert running.drip(client, first, b"1\r\n1\r\n" if chunked else b"1").startswith(b"HTTP/1.1 408 ")


def test_larger_bodies_have_more_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(exchange, "SLOWEST_BYTES_PER_S", MAX_BODY / 10)
    with running.connect() as client:
        client.sendall(HEAD % b"read" + b"content-length: 2\r\n\r\n1")
        client.settimeout(2 * SHORT_S)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.sendall(b"2")
        assert client.recv(65536).endswith(b"12")


def test_the_rest_of_a_body_that_nobody_wants(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer has come, and the connection may go on, but not wait for ever."""
    monkeypatch.setattr(connection, "DISCARD_TIMEOUT_S", SHORT_S)
    with running.connect() as client:
        assert running.drip(client, HEAD % b"other" + b"content-length: 100000\r\n\r\n", b"1").endswith(b"0")
    with running.connect() as client:
        client.sendall(HEAD % b"other" + b"content-length: 2\r\n\r\n1")
        assert client.recv(65536).endswith(b"0")
        client.sendall(b"2" + HEAD % b"read" + b"content-length: 1\r\n\r\n7")
        assert client.recv(65536).endswith(b"7")
        client.settimeout(2 * SHORT_S)
        with pytest.raises(TimeoutError):
            client.recv(1)  # what was awaited has come


def test_a_body_that_is_too_large_is_read_for_a_while(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_DISCARDED_BYTES", 2 * MAX_BODY)
    for size in (MAX_BODY, MAX_BODY + 1, 2 * MAX_BODY):
        with running.connect() as client:
            client.sendall(HEAD % b"read" + b"content-length: %d\r\n\r\n" % size + b"1".ljust(size))
            assert client.recv(65536).startswith(b"HTTP/1.1 %d " % (200 if size == MAX_BODY else 413))
    with running.connect() as client:
        sent = 0
        with contextlib.suppress(ConnectionError):
            client.sendall(HEAD % b"read" + b"content-length: 100000000\r\n\r\n")
            while sent < 100_000_000:
                sent += client.send(bytes(65536))
        assert sent < 20 * MAX_BODY, "it does not read all"


def test_an_idle_connection_ends(running: Running) -> None:
    with running.connect() as client:
        client.sendall(HEAD % b"read" + b"content-length: 1\r\n\r\n7")
        assert client.recv(65536).endswith(b"7")
        assert client.recv(1) == b""


def test_an_answer_that_nobody_takes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of it is left: the connection ends, and what is kept for it."""
    monkeypatch.setattr(socket_transport, "HIGH_WATER_BYTES", 2 * LARGE)  # the answer is never too much to wait for
    with socket.socket() as client, running.connect() as reader:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        for each in (client, reader):
            each.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = 0
        while data := reader.recv(2**20):
            running.abort_stalled(LONG_S)
            received += len(data)
        assert received > LARGE

        def gone() -> bool:
            running.abort_stalled(SHORT_S)
            return not running.waiting()

        eventually(gone, "the end of the connection")
