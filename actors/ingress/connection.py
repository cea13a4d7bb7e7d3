"""Connections: uvicorn's HTTP/1.1 protocol, with a journal, and limits for clients that do not do their part."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.journal import Recovered, ReplayState
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.ingress.socket_transport import SocketTransport
from llm_runtime.actors.ingress.wire import wire_of
from llm_runtime.actors.ingress.work import Work

HEADER_TIMEOUT_S = 20.0
"""For the request line and headers, from the connection's or the request's first byte."""
MAX_HEADER_BYTES = 64 * 2**10
DISCARD_TIMEOUT_S = 10.0
"""For the rest of a request that has been answered before it was read."""
_EMPTY = (b"content-length", b"0")


class Connection(HttpToolsProtocol):
    """One client's connection.

    One that an earlier incarnation has left is given the same requests again. Those that were answered are skipped; the
    first other one is answered by the same endpoint, from what is journalled of it, and goes on where the answer was.

    Args:
        recovered: what an earlier incarnation has left in it.

    Attributes:
        stalled_since: since when the client has left so much unread that the server waits for it; 0 if it does not.
    """

    transport: SocketTransport

    def __init__(self, *args: Any, recovered: Recovered | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        recovered = recovered or Recovered()
        self._application, self.app = self.app, self._answer
        self._answered = recovered.answered
        self._replay = recovered.replay
        self._in_request = False
        self._running: RequestResponseCycle | None = None
        self.url = b""
        self.stalled_since = 0.0
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._discard_timer: asyncio.TimerHandle | None = None
        self._receiving: RequestResponseCycle | None = None
        """The request whose headers have been read, from then on until the next one begins."""
        self._in_trailers = False
        self._idle_bytes = 0
        """Read since the last part of a request's body: borders of chunks, and trailers."""
        self._broken = False
        """What the client sends after the request that is being answered is no HTTP."""

    def abort_if_stalled(self, limit_s: float) -> None:
        """Ends the connection if its client has read nothing for so long. Requests on it end as disconnected."""
        since = self.stalled_since or self.transport.untaken_since
        if since and time.monotonic() - since > limit_s:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_headers()
        self._stop_discarding()
        super().connection_lost(exc)

    def go_on(self, recovered: Recovered) -> None:
        """Takes up what an earlier incarnation has left; after `connection_made`."""
        self.transport.asides = recovered.replay.asides
        if recovered.closed:
            self.transport.close()
        elif recovered.received:
            self.data_received(bytes(recovered.received))
        else:
            self.transport.rest()
            if recovered.idle:
                self._got_headers()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    @property
    def is_busy(self) -> bool:
        """A request is being read or answered, or the client has not taken all of an answer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering or self._in_request or bool(self.transport.get_write_buffer_size())

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._broken:
            self.transport.pause_reading()
            return
        if self._header_timer is not None or not self._in_request:
            end = data.find(b"\r\n\r\n")
            if self._header_bytes + (len(data) if end < 0 else end) > MAX_HEADER_BYTES:
                self._refuse(ApiError(431, "The request's headers are too large."))
                return
        self._idle_bytes += len(data)
        try:
            self._parse(data)
        except HttpParserError:
            self._refuse(ApiError(400, "The request is not valid HTTP."))
            return
        if self._idle_bytes > 2 * MAX_HEADER_BYTES:
            self._refuse(ApiError(431, "The request's trailers or chunk extensions are too large."))
            return
        self._forget_answered()
        if self._header_timer is not None:
            self._header_bytes += len(data)

    def _parse(self, data: bytes) -> None:
        """Feeds the parser. It stops at an offer to go on with another protocol; that is passed over, as RFC 9110 §7.8
        allows, by giving the request to a new parser without it."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as stop:
                if self.parser.get_method() == b"CONNECT":
                    raise HttpParserError("this is no proxy") from None
                version = self.parser.get_http_version().encode()
                head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
                head += [b"%b: %b" % each for each in self.headers if each[0] not in (b"upgrade", b"http2-settings")]
                data = b"\r\n".join([*head, b"", b""]) + data[stop.args[0] :]
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request, self._in_trailers, self._receiving = True, False, None
        self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_trailers:  # those must not be taken for headers
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._idle_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see `_parse`
        super().on_message_complete()
        self._in_request = False
        self._stop_discarding()
        self.transport.request_arrived()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_trailers = True
        self._idle_bytes = 0
        self._got_headers()
        self._check_headers()
        if self.url == b"*" and self.parser.get_method() == b"OPTIONS":
            self.url = b"/"
        if self.parser.get_http_version() != "1.1":
            self.expect_100_continue = False  # RFC 9110 §10.1.1
        super().on_headers_complete()
        self._receiving = self.cycle

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_request and self._is_answered():  # the rest of a body that nobody wants
            self._discard_timer = self.loop.call_later(DISCARD_TIMEOUT_S, self.transport.close)

    def _check_headers(self) -> None:
        """Raises HttpParserError for what proxies and servers read differently, or must not be sent."""
        names = [name for name, _ in self.headers]
        new = self.parser.get_http_version() == "1.1"
        if names.count(b"host") > 1 or (new and b"host" not in names):
            raise HttpParserError("one Host header is needed")
        for name, value in self.headers:
            if name == b"transfer-encoding" and (not new or value.strip().lower() != b"chunked"):
                raise HttpParserError("no other transfer coding than chunked is known, nor that in HTTP/1.0")

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
        assert cycle is not None
        replay, self._replay = self._replay, ReplayState()
        work = scope["state"]["work"] = Work(transport.slot, replay)
        old = scope["http_version"] == "1.0"  # streams end with the connection, RFC 9112 §6.3
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/") or "/"
        if work.begun:
            cycle.chunked_encoding = not old
            await self._repeat(send, {"type": "http.response.start", "status": 200})
        start: Message | None = None

        def write(body: bytes) -> bool:
            """A chunk of a stream that has begun: what `send_recorded` would do, in half the time."""
            transport.write_record(b"%x\r\n%b\r\n" % (len(body), body), work.covered)
            return not self.flow.write_paused

        def write_bare(body: bytes) -> bool:
            transport.write_record(body, work.covered)
            return not self.flow.write_paused

        scope["state"]["write"] = write_bare if old else write

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
                    if old and not any(name == b"content-length" for name, _ in head["headers"]):
                        cycle.chunked_encoding = False
                    await send(head)
                if old and cycle.chunked_encoding is False and not cycle.expected_content_length:
                    cycle.expected_content_length = len(message["body"])
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
        if not (self._in_request or self.pipeline) and self._is_answered():
            self.transport.rest()

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

    def _stop_discarding(self) -> None:
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None

    def _headers_are_late(self) -> None:
        self._header_timer = None
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers what is no request, in the way of the protocol that its path belongs to, and ends the connection."""
        self._got_headers()
        self._broken = True
        running = self._running
        answering = running is not None and not running.response_complete
        if running is not None and answering and (running is not self._receiving or running.response_started):
            running.keep_alive = False  # its client gets the answer, and then the end
            self.pipeline.clear()
            return
        body = wire_of(self.url).error(error)
        head = [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        head.append(b"x-request-id: " + new_rid().encode())
        self.transport.write(STATUS_LINE[error.status] + b"\r\n".join([*head, b"", body]))
        self.transport.close()
