"""uvicorn's server, with connections that outlive the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections import deque
from collections.abc import Iterator

import uvicorn

from llm_runtime.actors.actor import Context
from llm_runtime.actors.ingress.connection import Connection
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.journal import Journal, Recovered, Slot
from llm_runtime.actors.ingress.positions import positions
from llm_runtime.actors.ingress.protection import Protection, Shelter
from llm_runtime.actors.ingress.socket_transport import SocketTransport

logger = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 0.5
"""After a failure to accept, such as too many open files."""
SPARE_DESCRIPTORS = 256
"""That many are no connections', or a third of the few there are: ZeroMQ ends the process when it gets none."""
DRAIN_STEP_S = 0.05
REFUSED_AT_ONCE = 32
"""So many refused connections are open at a time, above what others may have."""
REFUSED_LINGER_S = 0.5
LEFT_AT_ONCE = 64
"""So many idle connections of an earlier incarnation are taken over before something else has its turn."""

_BUSY = ApiError(503, "The server has as many connections as it may have: try again later.", code="overloaded").body
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)


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
        self._shelter = Shelter(journal, context.link, counters, context.incarnation)
        self._stopped = False
        self._left: deque[str] = deque()
        """Names of connections without a request that an earlier incarnation has left."""
        self._loop: asyncio.AbstractEventLoop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort_stalled(self, limit_s: float) -> None:
        """Ends the connections of clients that have read nothing for so long."""
        for connection in self._connections():
            connection.abort_if_stalled(limit_s)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes over what is stored, then begins to accept."""
        self._loop = asyncio.get_running_loop()
        stored = self._context.stored_fds
        owners = {} if self._journal is None else self._journal.owners({int(name) for name in stored})
        for serial, number in owners.items():
            self._take_over(serial, number)
        self._left.extend(name for name in stored if int(name) not in owners)
        self._take_over_left()
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
            self._pause_accepting()
            return
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        beyond = accepted.fileno() - (limit - min(SPARE_DESCRIPTORS, limit // 3))
        if beyond >= 0:
            self._refuse(accepted)
            if beyond >= REFUSED_AT_ONCE:
                self._pause_accepting()
            return
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connect(accepted, self._shelter.accepted(accepted), Recovered())

    def _pause_accepting(self) -> None:
        """Those who connect meanwhile wait for a moment."""
        self._loop.remove_reader(self._listener)
        self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)

    def _accept_again(self) -> None:
        if not self._stopped:
            self._loop.add_reader(self._listener, self._accept)

    def _refuse(self, connection: socket.socket) -> None:
        """There are as many connections as this process may have: an answer that says so, whatever is asked. It stays
        open for a moment, so that what the client sends meanwhile does not make the kernel throw the answer away."""
        self._counters["connections_refused"] += 1
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.send(_TOO_MANY)
            connection.shutdown(socket.SHUT_WR)
        self._loop.call_later(REFUSED_LINGER_S, connection.close)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends connections once they have no request. Goes on to accept until then, because the listening socket stays
        open: who connects is told at once (see `Service.draining`) and need not wait for the end."""
        deadline = self._loop.time() + (self.config.timeout_graceful_shutdown or 0)
        for connection in self._connections():
            connection.shutdown()
        while any(each.is_busy for each in self._connections()) and self._loop.time() < deadline:
            await asyncio.sleep(DRAIN_STEP_S)
        self._stopped = True
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self.server_state.tasks:
            task.cancel()
        for connection in self._connections():
            connection.transport.close()
        await asyncio.sleep(0)  # sockets are closed on the loop's next round

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _take_over(self, serial: int, number: int) -> None:
        """Goes on with a connection that has a request."""
        assert self._journal is not None
        connection = socket.socket(fileno=self._context.stored_fds[str(serial)][0])
        slot: Slot | None = None
        try:
            slot = self._journal.reopen(number)
            read, taken = positions(connection)
            recovered = slot.recover(serial, read, taken)
        except (OSError, ValueError) as error:
            if not isinstance(error, ConnectionAbortedError):  # that one needs no going on
                logger.warning("a connection cannot go on: %s", error)
                self._counters["connections_lost"] += 1
            connection.close()
            self._link.remove_fd(str(serial))
            if slot is not None:
                slot.release()
            return
        self._counters["connections_resumed"] += 1
        self._connect(connection, self._shelter.found(connection, serial, slot, read, taken), recovered)

    def _take_over_left(self) -> None:
        """Goes on with connections that have no request, some at a time: those that have one come first."""
        for _ in range(min(LEFT_AT_ONCE, len(self._left))):
            name = self._left.popleft()
            connection = socket.socket(fileno=self._context.stored_fds[name][0])
            try:
                read, taken = positions(connection)
            except OSError:
                connection.close()
                self._link.remove_fd(name)
                continue
            self._counters["connections_resumed"] += 1
            protection = self._shelter.found(connection, int(name), None, read, taken)
            self._connect(connection, protection, Recovered(idle=taken > 0))
        if self._left:
            self._loop.call_later(0, self._take_over_left)

    def _connect(self, connection: socket.socket, protection: Protection, recovered: Recovered) -> None:
        connection.setblocking(False)
        protocol = Connection(self.config, self.server_state, {}, self._loop, recovered=recovered)
        transport = SocketTransport(self._loop, connection, protection)
        transport.start(protocol, recovered.unsent)
        transport.resume_reading()
        protocol.go_on(recovered)
