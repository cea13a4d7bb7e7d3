"""Connections: uvicorn's HTTP/1.1 protocol, and limits for clients that do not do their part."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from actors.ingress.errors import ApiError

HEADER_TIMEOUT_S = 20.0
"""For the request line and headers, from the connection's or the request's first byte."""
MAX_HEADER_BYTES = 64 * 2**10


class Connection(HttpToolsProtocol):
    """One client's connection.

    Attributes:
        stalled_since: since when the client has left so much unread that the server waits for it; 0 if it does not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(ApiError(431, "The request's headers are too large."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

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
