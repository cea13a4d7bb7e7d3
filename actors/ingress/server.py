"""uvicorn's server, with connections that outlive the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn

from actors.actor import Context
from actors.ingress.connection import Connection
from actors.ingress.journal import Journal, Recovered, Slot
from actors.ingress.positions import positions
from actors.ingress.socket_transport import SocketTransport

logger = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 0.5
"""After a failure to accept, such as too many open files."""


class Server(uvicorn.Server):
    """Accepts connections and leaves a duplicate of each with the supervisor; takes over those of the worker's earlier
    incarnation. Leaves signals to the supervisor's link.

    Args:
        listener: a listening socket; other workers may accept from it too.
        journal: what is known of open connections, None if they are not to survive.
        counters: see `IngressMetrics`.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        journal: Journal | None,
        context: Context,
        counters: dict[str, int],
    ) -> None:
        super().__init__(config)
        listener.setblocking(False)
        self._listener = listener
        self._journal = journal
        self._context = context
        self._link = context.link
        self._counters = counters
        self._serial = context.incarnation << 32
        self._next_slot: Slot | None = None
        self._loop: asyncio.AbstractEventLoop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort_stalled(self, limit_s: float) -> None:
        """Ends the connections of clients that have read nothing for so long."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.abort_if_stalled(limit_s)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes over what is parked, then begins to accept."""
        self._loop = asyncio.get_running_loop()
        for name, (descriptor, meta) in self._context.parked.items():
            self._take_over(name, socket.socket(fileno=descriptor), int.from_bytes(meta, "little"))
        self.servers = [_Acceptor(self._loop, self._listener)]  # type: ignore[list-item]
        self._prepare_slot()
        self._loop.add_reader(self._listener, self._accept)
        self.started = True

    def _accept(self) -> None:
        """Accepts one connection: while others wait, another worker may be the first to take the next one."""
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            logger.warning("cannot accept connections: %s; trying again", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(ACCEPT_AGAIN_S, self._loop.add_reader, self._listener, self._accept)
            return
        slot = self._next_slot
        if slot is not None:
            try:
                self._link.park(str(slot.number), accepted.fileno(), self._serial.to_bytes(8, "little"))
            except ValueError:
                slot = None
            else:
                self._prepare_slot()
        if slot is None:
            self._counters["connections_unprotected"] += 1
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connect(accepted, slot, Recovered())

    def _take_over(self, name: str, connection: socket.socket, serial: int) -> None:
        slot: Slot | None = None
        try:
            if self._journal is None:
                raise ValueError("there is no journal")
            slot = self._journal.reopen(int(name))
            recovered = slot.recover(serial, *positions(connection))
        except (OSError, ValueError) as error:
            if not isinstance(error, ConnectionAbortedError):  # that one needs no going on
                logger.warning("a connection cannot go on: %s", error)
                self._counters["connections_lost"] += 1
            connection.close()
            self._link.unpark(name)
            if slot is not None:
                slot.release()
            return
        self._counters["connections_resumed"] += 1
        self._connect(connection, slot, recovered)

    def _connect(self, connection: socket.socket, slot: Slot | None, recovered: Recovered) -> None:
        connection.setblocking(False)
        protocol = Connection(self.config, self.server_state, {}, self._loop, slot=slot, recovered=recovered)
        if slot is not None:
            slot.on_full = lambda: self._unprotect(slot)
        transport = SocketTransport(self._loop, connection, slot, lambda: self._ended(slot))
        transport.start(protocol, recovered.unsent)
        transport.resume_reading()
        protocol.go_on(recovered)

    def _prepare_slot(self) -> None:
        self._serial += 1
        self._next_slot = None if self._journal is None else self._journal.open(self._serial)

    def _unprotect(self, slot: Slot) -> None:
        self._counters["connections_unprotected"] += 1
        self._link.unpark(str(slot.number))

    def _ended(self, slot: Slot | None) -> None:
        if slot is not None:
            self._link.unpark(str(slot.number))
            slot.release()
            if self._next_slot is None:
                self._prepare_slot()


class _Acceptor:
    """What uvicorn stops when it shuts down."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        self._loop = loop
        self._listener = listener

    def close(self) -> None:
        """Accepts no more."""
        self._loop.remove_reader(self._listener)
        self._listener.close()

    async def wait_closed(self) -> None:
        """It is closed at once."""
