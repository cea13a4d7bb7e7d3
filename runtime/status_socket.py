"""The Unix socket `status` of a run directory: tells whoever connects what the node is doing, and takes no question.

The ingress reads it for the status page. It could ask the socket `control`, but whoever can do that can also stop the
node, and the answers there are in the types of supervisors, of which actors know nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

NAME = "status"
_SEND_BUFFER_BYTES = 4 * 2**20


class StatusSocket:
    """The node's end.

    Args:
        report: what to tell, a JSON document; called once for each connection.
    """

    def __init__(self, run_dir: Path, report: Callable[[], Any]) -> None:
        self._report = report
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        path = run_dir / NAME
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(16)
        self.fd = self._listener.fileno()
        """Readable when `serve` should be called."""

    def serve(self) -> None:
        """Tells one that has connected, without waiting: the text fits a socket's buffer."""
        try:
            reader, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        with reader:
            reader.setblocking(False)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            try:
                reader.send(msgspec.json.encode(self._report()))
            except OSError:
                pass  # it does not read

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()
