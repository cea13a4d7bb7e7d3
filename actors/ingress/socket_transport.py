"""The transport of a connection that outlives the process: its bytes go through the journal."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import Any

from llm_runtime.actors.ingress.journal import READ_BYTES, Slot
from llm_runtime.actors.ingress.protection import Protection

logger = logging.getLogger(__name__)

HIGH_WATER_BYTES = 64 * 2**10
"""The protocol is told to pause when more than this waits to be sent, and to go on below a quarter of it."""

_scratch = memoryview(bytearray(READ_BYTES))


class SocketTransport(asyncio.Transport):
    """A stream transport over a connected, non-blocking socket. Reading begins with `resume_reading`.

    Differs from the event loop's own in what a successor needs: received bytes are read into the journal, bytes to be
    sent are journalled first, and how many of them the kernel has taken is always known.

    Args:
        protection: what makes the connection outlive the worker.

    Attributes:
        muted: what is written was written by an earlier incarnation; it is dropped.
        asides: that many writes outside of `record` are to be dropped for the same reason.
        untaken_since: since when the kernel takes nothing of what waits to be sent; 0 if nothing does.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        protection: Protection,
    ) -> None:
        super().__init__({"socket": connection})
        self.muted = False
        self.asides = 0
        self.untaken_since = 0.0
        self._loop = loop
        self._socket = connection
        self._protection = protection
        self._protocol: asyncio.Protocol
        self._record: list[bytes] | None = None
        self._buffer = bytearray()
        self._reading = self._closing = self._lost = self._protocol_paused = self._resting = False

    def start(self, protocol: asyncio.Protocol, unsent: bytes = b"") -> None:
        """Introduces itself to the protocol. `unsent` is in the journal already."""
        self._protocol = protocol
        protocol.connection_made(self)
        if unsent:
            self._give(unsent)

    # -- reading --------------------------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        slot = self._protection.slot or self._protection.before_reading()
        self._resting = False
        inlet = None if slot is None else slot.inlet()
        into = _scratch if inlet is None else inlet
        try:
            count = self._socket.recv_into(into)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        data = bytes(into[:count])
        if slot is not None and inlet is not None and count:
            slot.read(count)
        if not count:
            self._protocol.eof_received()
            self.close()
            return
        try:
            self._protocol.data_received(data)
        except Exception as error:
            logger.exception("an error in the protocol")
            self._lose(error)

    # -- writing --------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._lost or self.muted or not data:
            return
        if self._record is not None:
            self._record.append(bytes(data))
        elif self.asides:
            self.asides -= 1
        elif not self._closing:
            self._send(bytes(data), 0, last=False, aside=True)

    def begin_record(self) -> None:
        """What is written until `end_record` is journalled and sent as one."""
        self._record = []

    def end_record(self, covered: int, last: bool) -> None:
        """Sends what was written since `begin_record`.

        Args:
            covered: see `Slot.sent`.
            last: it ends an answer.
        """
        record, self._record = self._record, None
        data = b"".join(record or ())
        if data and not self._lost:
            self._send(data, covered, last, aside=False)
        if self._closing and not self._buffer:
            self._finish_soon(None)

    def write_record(self, data: bytes, covered: int) -> None:
        """The same for bytes that are there already and do not end an answer."""
        if not self._lost:
            self._send(data, covered, last=False, aside=False)

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    @property
    def slot(self) -> Slot | None:
        """The connection's journal, None if it has none now."""
        return self._protection.slot

    def request_arrived(self) -> None:
        """All of a request has been read."""
        self._protection.is_whole()

    def rest(self) -> None:
        """All requests have been answered: what the kernel has taken of the answers is needed no longer."""
        if not self._buffer:
            self._protection.rest()
            return
        self._resting = True
        if (slot := self._protection.slot) is not None:
            slot.forget(bytes(self._buffer))

    def _send(self, data: bytes, covered: int, last: bool, aside: bool) -> None:
        if (slot := self._protection.slot) is not None:
            slot.sent(data, covered, last=last, aside=aside, closes=self._closing)
        self._give(data)

    def _give(self, data: bytes) -> None:
        if not self._buffer:
            try:
                count = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                count = 0
            except OSError as error:
                self._lose(error)
                return
            if count == len(data):
                if (slot := self._protection.slot) is not None:
                    slot.taken()
                return
            data = data[count:]
            self.untaken_since = time.monotonic()
            self._loop.add_writer(self._socket, self._writable)
        self._buffer += data
        if len(self._buffer) > HIGH_WATER_BYTES and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        try:
            count = self._socket.send(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        del self._buffer[:count]
        self.untaken_since = time.monotonic() if self._buffer else 0.0
        if not self._buffer:
            self._loop.remove_writer(self._socket)
            if (slot := self._protection.slot) is not None:
                slot.taken()
            if self._resting:
                self._protection.rest()
            if self._closing:
                self._finish_soon(None)
        if self._protocol_paused and len(self._buffer) <= HIGH_WATER_BYTES // 4:
            self._protocol_paused = False
            self._protocol.resume_writing()

    # -- the end --------------------------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self.pause_reading()
        self._closing = True
        if (slot := self._protection.slot) is not None and self._record is None:
            slot.close()
        if not self._buffer and self._record is None:
            self._finish_soon(None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        self.pause_reading()
        self._closing = True
        if self._buffer:
            self._loop.remove_writer(self._socket)
            self._buffer.clear()
            self.untaken_since = 0.0
        self._finish_soon(error)

    def _finish_soon(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._loop.call_soon(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)  # the supervisor's duplicate would keep it open
            except OSError:
                pass
            self._socket.close()
            self._protection.end()
