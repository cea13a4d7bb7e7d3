"""Packets between a supervisor and a process it started: bytes and descriptors over a Unix socket pair.

SOCK_SEQPACKET keeps message boundaries, carries descriptors (SCM_RIGHTS), cannot be addressed by anybody else and
ends with the process. A payload longer than one packet is cut; the first byte of a packet says whether more follow.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

PACKET_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_FDS = 250
MORE, LAST = b"\x01", b"\x00"
_RETRY = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)  # the last: too many descriptors in flight


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends for two channels."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end of the pair. Never blocks: what the socket does not take waits in a queue until `flush()`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._out: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._in = bytearray()
        self._in_fds: list[int] = []
        self.closed = False
        """The other end is gone."""

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def backlog(self) -> int:
        """Packets that wait to be sent."""
        return len(self._out)

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Sends or queues one message; descriptors that have to wait are duplicated, so the caller may close his."""
        if self.closed:
            return
        starts = range(0, max(len(payload), 1), PACKET_BYTES)
        for start in starts:
            last = start == starts[-1]
            packet = (LAST if last else MORE) + payload[start : start + PACKET_BYTES]
            handed = tuple(fds) if last else ()
            if self._out or not self._send_packet(packet, handed):
                self._out.append((packet, tuple(os.dup(fd) for fd in handed)))

    def flush(self) -> None:
        """Sends what was queued, as far as the socket takes it."""
        while self._out and not self.closed:
            packet, fds = self._out[0]
            if not self._send_packet(packet, fds):
                return
            self._out.popleft()
            for fd in fds:
                os.close(fd)

    def _send_packet(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._sock, [packet], fds)
        except OSError as error:
            if error.errno in _RETRY:
                return False
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN):
                raise
            self.closed = True
        return True

    def receive(self, limit: int = 256) -> list[tuple[bytes, list[int]]]:
        """At most `limit` messages that have arrived; sets `closed` when the other end is gone."""
        messages: list[tuple[bytes, list[int]]] = []
        while len(messages) < limit:
            try:
                packet, fds, _, _ = socket.recv_fds(
                    self._sock, PACKET_BYTES + 1, MAX_FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # the other end died with messages unread; what it had sent is still to be read
            if not packet:
                self.closed = True
                break
            self._in += packet[1:]
            self._in_fds += fds
            if len(self._in) > MAX_PAYLOAD_BYTES:
                self.closed = True
                break
            if packet[:1] == LAST:
                messages.append((bytes(self._in), self._in_fds))
                self._in, self._in_fds = bytearray(), []
        return messages

    def close(self) -> None:
        """Closes the socket and the descriptors that were not sent or not delivered."""
        self.closed = True
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        for fd in self._in_fds:
            os.close(fd)
        self._out.clear()
        self._in_fds = []
        self._sock.close()
