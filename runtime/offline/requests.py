"""Many requests to a private node at once, answered in order."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.offline.node import PrivateNode

IN_FLIGHT = 128
"""Requests that the node is given at once; what it does with them is its scheduler's business."""
ATTEMPTS = 3
"""Times that a request is sent whose connection breaks. The server resumes connections itself, so that is rare."""
_BUSY = (429, 503)


def post_all(node: PrivateNode, path: str, bodies: Sequence[Any]) -> list[Any]:
    """The JSON answers to JSON requests, in their order.

    Raises UserError for the first request that is refused, and when the node has ended. Then, and when it is
    interrupted, the other requests are given up.
    """
    if not bodies:
        return []
    if node.closed:
        raise UserError("the LLM has been closed: make another one")
    batch = _Batch(node, path)
    try:
        with ThreadPoolExecutor(min(IN_FLIGHT, len(bodies)), thread_name_prefix="llm") as threads:
            futures = [threads.submit(batch.post, number, body) for number, body in enumerate(bodies)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                batch.give_up()
                raise
    finally:
        batch.close()


class _Batch:
    """Requests to one path, from several threads with a connection each."""

    def __init__(self, node: PrivateNode, path: str) -> None:
        self._node = node
        self._path = path
        address = urllib.parse.urlsplit(node.url)
        self._host, self._port = address.hostname or "", address.port
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._given_up = threading.Event()
        self._encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {node.api_key}"}

    def post(self, number: int, body: Any) -> Any:
        """One answer. Raises UserError."""
        data = self._encode(body)
        attempts = 0
        while True:
            attempts += 1
            try:
                status, answer, retry_after = self._post(data)
            except (OSError, http.client.HTTPException) as error:
                self._forget_connection()
                if self._given_up.is_set():
                    raise UserError("the request was given up") from None
                if problem := self._node.problem():
                    raise UserError(f"the node has ended, so make another LLM: {problem}") from None
                if attempts == ATTEMPTS:
                    raise UserError(f"the node breaks connections off ({error or type(error).__name__})") from None
                continue
            if status == 200:
                return msgspec.json.decode(answer)
            if status in _BUSY and retry_after and not self._given_up.wait(float(retry_after)):
                attempts = 0
                continue
            raise UserError(f"prompt {number}: {_message(answer, status)}")

    def _post(self, data: bytes) -> tuple[int, bytes, str]:
        connection = self._connection()
        connection.request("POST", self._path, data, self._headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers.get("Retry-After", "")

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = http.client.HTTPConnection(self._host, self._port)
            connection.connect()
            self._connections.append(connection)
            if self._given_up.is_set():  # just now, and this connection was not among those that were shut
                raise OSError
        return connection

    def _forget_connection(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is not None:
            self._own.connection = None
            connection.close()

    def give_up(self) -> None:
        """Ends all requests; those who wait for them get an error."""
        self._given_up.set()
        for connection in list(self._connections):
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connections, once the threads have ended."""
        for connection in self._connections:
            connection.close()


def _message(answer: bytes, status: int) -> str:
    try:
        return str(msgspec.json.decode(answer)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the node answers with status {status}"
