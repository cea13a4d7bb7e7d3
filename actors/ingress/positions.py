"""Where a TCP connection is, to the byte, as the kernel counts: what outlives the process that read and wrote it."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios

# <linux/tcp.h>, struct tcp_info: the state at byte 0; tcpi_bytes_acked and tcpi_bytes_received at byte 120.
_INFO_BYTES = 136
_COUNTERS = struct.Struct("=QQ")
_COUNTERS_AT = 120
_ESTABLISHED, _CLOSE_WAIT = 1, 8
_INT = struct.Struct("=i")


def positions(connection: socket.socket) -> tuple[int, int]:
    """Bytes that the kernel has handed to readers, and bytes that it has taken from writers, since the connection was
    accepted. Raises ConnectionAbortedError when the connection was reset or has been ended from this side.
    """
    info = _info(connection)
    while True:
        unread, unacknowledged = _queued(connection, termios.FIONREAD), _queued(connection, termios.TIOCOUTQ)
        again = _info(connection)
        if again == info:
            break
        info = again  # something has arrived in between
    state, acknowledged, received = info
    if state not in (_ESTABLISHED, _CLOSE_WAIT):
        raise ConnectionAbortedError("the connection has ended")
    if state == _CLOSE_WAIT:
        received -= 1  # the end of the stream is counted like a byte
    return received - unread, acknowledged + unacknowledged


def _info(connection: socket.socket) -> tuple[int, int, int]:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        raise OSError("the kernel does not count the bytes of a connection")
    acknowledged, received = _COUNTERS.unpack_from(info, _COUNTERS_AT)
    return info[0], acknowledged, received


def _queued(connection: socket.socket, request: int) -> int:
    (count,) = _INT.unpack(fcntl.ioctl(connection.fileno(), request, bytes(_INT.size)))
    return int(count)
