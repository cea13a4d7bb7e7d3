"""Connections: uvicorn's HTTP/1.1 protocol, with a journal, and limits for clients that do not do their part."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from actors.ingress.errors import ApiError
from actors.ingress.journal import Past, Recovered, Slot
from actors.ingress.socket_transport import SocketTransport
from actors.ingress.work import Work

HEADER_TIMEOUT_S = 20.0
"""For the request line and headers, from the connection's or the request's first byte."""
MAX_HEADER_BYTES = 64 * 2**10
_EMPTY = (b"content-length", b"0")


class Connection(HttpToolsProtocol):
    """One client's connection.

    One that an earlier incarnation has left is given the same requests again. Those that were answered are skipped; the
    first other one is answered by the same endpoint, from what is journalled of it, and goes on where the answer was.

    Args:
        slot: the connection's journal, None if it has none.
        recovered: what an earlier incarnation has left in it.

    Attributes:
        stalled_since: since when the client has left so much unread that the server waits for it; 0 if it does not.
    """

    transport: SocketTransport

    def __init__(self, *args: Any, slot: Slot | None = None, recovered: Recovered | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        recovered = recovered or Recovered()
        self._application, self.app = self.app, self._answer
        self._slot = slot
        self._answered = recovered.answered
        self._past = recovered.past
        self._in_request = False
        self._running: RequestResponseCycle
        self.stalled_since = 0.0
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def abort_if_stalled(self, limit_s: float) -> None:
        """Ends the connection if its client has read nothing for so long. Requests on it end as disconnected."""
        if self.stalled_since and time.monotonic() - self.stalled_since > limit_s:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_headers()
        super().connection_lost(exc)

    def go_on(self, recovered: Recovered) -> None:
        """Takes up what an earlier incarnation has left; after `connection_made`."""
        self.transport.asides = recovered.past.asides
        if recovered.closed:
            self.transport.close()
        elif recovered.received:
            self.data_received(bytes(recovered.received))
        elif recovered.idle:
            self._got_headers()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def data_received(self, data: bytes) -> None:
        if self._header_timer is not None or not self._in_request:
            end = data.find(b"\r\n\r\n")
            if self._header_bytes + (len(data) if end < 0 else end) > MAX_HEADER_BYTES:
                self._refuse(ApiError(431, "The request's headers are too large."))
                return
        super().data_received(data)
        self._forget_answered()
        if self._header_timer is not None:
            self._header_bytes += len(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request = True
        self._expect_headers()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_request = False

    def on_headers_complete(self) -> None:
        self._got_headers()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def pause_writing(self) -> None:
        self.stalled_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        super().resume_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application on a request, and makes each message of the answer one record of the journal; the
        headers go with the first part of the body."""
        transport = self.transport
        if self._answered:
            self._answered -= 1
            await self._repeat(send, {"type": "http.response.start", "status": 200, "headers": [_EMPTY]})
            await self._repeat(send, {"type": "http.response.body"})
            self._forget_answered()
            return
        cycle = self._running
        past, self._past = self._past, Past()
        work = scope["state"]["work"] = Work(self._slot, past)
        if work.begun:
            await self._repeat(send, {"type": "http.response.start", "status": 200})
        start: Message | None = None

        def write(body: bytes) -> bool:
            """A chunk of a stream that has begun: what `send_recorded` would do, in half the time."""
            transport.write_record(b"%x\r\n%b\r\n" % (len(body), body), work.covered)
            return not self.flow.write_paused

        scope["state"]["write"] = write

        async def send_recorded(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            last = not message.get("more_body", False)
            if start is None and not last and cycle.chunked_encoding:
                if self.flow.write_paused:
                    await self.flow.drain()
                write(message["body"])
                return
            transport.begin_record()
            try:
                if start is not None:
                    head, start = start, None
                    await send(head)
                await send(message)
            finally:
                transport.end_record(work.covered, last)
            if last:
                self._forget_answered()

        await self._application(scope, receive, send_recorded)

    async def _repeat(self, send: Send, message: Message) -> None:
        """Brings the protocol to where it was after a message that was sent, without waiting for the client."""
        paused = self.flow.write_paused
        self.flow.resume_writing()
        self.transport.muted = True
        try:
            await send(message)
        finally:
            self.transport.muted = False
            if paused:
                self.flow.pause_writing()

    def _forget_answered(self) -> None:
        """Empties the journal when everything that was asked has been answered."""
        if self._slot is not None and not (self._in_request or self.pipeline) and self._is_answered():
            self._slot.forget(self.transport.pending)

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete and not self.transport.is_closing()

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_are_late)

    def _got_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        self._header_timer = None
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        self._got_headers()
        body = error.body
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
