"""The Unix socket `status` of a run directory: tells what the node does, and restarts processes.

The ingress is on the other end, for the status page. It could ask the socket `control`, but whoever can do that can
also stop the node, and the answers there are in the types of supervisors, of which actors know nothing.

A reader sends one line and gets one JSON document: `status`, `restart NAME` or `rolling`. One that ends its side
without a line gets the status.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

NAME = "status"
MAX_LINE_BYTES = 256
MAX_READERS = 32
"""Who has connected and waits. The oldest has to go for one more."""
_SEND_BUFFER_BYTES = 4 * 2**20

Reply = Callable[[Any], None]


class Loop(Protocol):
    """What calls back when a descriptor is readable."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None: ...
    def unwatch(self, fd: int) -> None: ...


class StatusSocket:
    """The node's end.

    Args:
        loop: watches the readers. `serve` has to be called when `fd` is readable.
        answer: called with a line and the function that takes the answer, a JSON document, now or later.
    """

    def __init__(self, run_dir: Path, loop: Loop, answer: Callable[[str, Reply], None]) -> None:
        self._loop = loop
        self._answer = answer
        self._readers: dict[socket.socket, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        path = run_dir / NAME
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(16)
        self.fd = self._listener.fileno()

    def serve(self) -> None:
        """Takes one that has connected."""
        try:
            reader, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        if len(self._readers) >= MAX_READERS:
            self._drop(next(iter(self._readers)))
        reader.setblocking(False)
        self._readers[reader] = b""
        self._loop.watch(reader.fileno(), lambda: self._read(reader))

    def _read(self, reader: socket.socket) -> None:
        try:
            data = reader.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            return self._drop(reader)
        line = self._readers[reader] + data
        if data and b"\n" not in line:
            if len(line) > MAX_LINE_BYTES:
                return self._drop(reader)
            self._readers[reader] = line
            return
        self._loop.unwatch(reader.fileno())  # nothing more is read of it
        question = line.partition(b"\n")[0].decode("utf-8", "replace").strip()
        self._answer(question or "status", lambda document: self._tell(reader, document))

    def _tell(self, reader: socket.socket, document: Any) -> None:
        """Without waiting: the text fits a socket's buffer."""
        if reader not in self._readers:
            return
        try:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            reader.send(msgspec.json.encode(document))
        except OSError:
            pass  # it does not read
        self._drop(reader)

    def _drop(self, reader: socket.socket) -> None:
        del self._readers[reader]
        self._loop.unwatch(reader.fileno())
        reader.close()

    def close(self) -> None:
        """Takes no more connections, and drops those that there are."""
        for reader in list(self._readers):
            self._drop(reader)
        self._listener.close()
