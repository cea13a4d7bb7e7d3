"""One HTTP request and its answer, straight on ASGI: a JSON document, or a stream of events."""

from __future__ import annotations

import asyncio
import codecs
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from llm_runtime.actors.ingress.content_coding import CODINGS, UNKNOWN_CODING, body_too_large, decompressed
from llm_runtime.actors.ingress.decoding import decoded
from llm_runtime.actors.ingress.errors import ApiError, internal
from llm_runtime.actors.ingress.wire import OPENAI, Wire
from llm_runtime.actors.ingress.work import Work

logger = logging.getLogger(__name__)

BODY_CHUNK_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 60.0
SLOWEST_BYTES_PER_S = 2**17
"""A whole body may take as long as this, and as the largest one takes at this speed."""
SHUTTING_DOWN = "shutting_down"
"""Code of the error with which a server that is about to stop refuses requests."""
MAX_DISCARDED_BYTES = 64 * 2**20

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
"""What is taken over of a client's `X-Request-Id`; others are as if they had not been sent."""
_JSON = [(b"content-type", b"application/json")]
_MAX_WARNINGS = 16
_WARNING_LENGTH = 256
_UNQUOTABLE = re.compile(r'[^\x20-\x7e]|["\\]')
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")

Write = Callable[[bytes], bool]
"""Sends complete events at once; whether the client keeps up with them."""


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


def request_id(scope: Scope) -> str:
    """The client's own name for a request (`X-Request-Id`), else its identity."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else str(scope["state"]["work"].identity.rid)


class Exchange:
    """One HTTP request and its answer.

    Attributes:
        work: what is journalled of the request.
        status: of the answer, once it has begun.
        on_body: told the request's body, if it is a right one.
        model: name of the model that the request is about, once it is known.
        request_id: the client's own name for the request (`X-Request-Id`), else its identity; the answer repeats it.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, wire: Wire = OPENAI) -> None:
        self.scope = scope
        self._wire = wire
        self.work: Work = scope["state"]["work"]
        self.request_id = request_id(scope)
        self._sent = self.work.begun
        self.status = 200 if self._sent else 0
        self.on_body: Callable[[bytes], None] | None = None
        self.model = ""
        self._warnings: list[bytes] = []
        self._receive = receive
        self._send = send
        self._task: asyncio.Task[None] | None = None
        self._interruption: ApiError | ClientGone | None = None

    # -- the request ----------------------------------------------------------------------------------------------

    def header(self, name: bytes) -> bytes:
        """A request header's value, empty if there is none."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return b""

    async def body(self, decoder: msgspec.json.Decoder[T], max_bytes: int, default: bytes = b"") -> T:
        """The request's JSON body. Raises ApiError when it is too large, slow, or not what the decoder wants.

        Args:
            default: stands for a body that is not there; not for browsers, which name an origin.
        """
        if default and not self._has_body and not self.header(b"origin"):
            await self._read(max_bytes)
            return decoder.decode(default)
        kind = self.header(b"content-type").partition(b";")[0].strip().lower()
        # Browsers name an origin, and let any page send what does not say that it is JSON.
        if kind != b"application/json" and (not self._wire.any_type or self.header(b"origin")):
            raise ApiError(415, "The Content-Type header must be application/json.")
        coding = self._coding()
        data = await self._read(max_bytes)
        if coding:
            data = decompressed(data, coding, max_bytes)
        data = data.removeprefix(codecs.BOM_UTF8)  # which editors and shells of Windows write
        document = decoded(data, decoder)
        if self.on_body is not None:
            self.on_body(data)
        return document

    def _coding(self) -> str:
        """The body's content coding, empty if it has none. Raises ApiError for one that is not known."""
        given = b",".join(value for name, value in self.scope["headers"] if name == b"content-encoding")
        coding = given.strip().lower().decode("latin-1")
        if coding in ("", "identity"):
            return ""
        if coding not in CODINGS:
            problem = f"The Content-Encoding '{coding}' is not known: send gzip, deflate or none."
            raise ApiError(415, problem, code=UNKNOWN_CODING)
        return coding

    @property
    def _has_body(self) -> bool:
        return self.header(b"content-length") not in (b"", b"0") or bool(self.header(b"transfer-encoding"))

    async def _read(self, max_bytes: int) -> bytes:
        too_large = body_too_large(max_bytes)
        length = self.header(b"content-length")
        if length.isdigit() and int(length) > max_bytes and (self.header(b"expect") or len(length) > 9):
            raise too_large
        ends_at = self.work.identity.arrived_at + max(BODY_TIMEOUT_S, max_bytes / SLOWEST_BYTES_PER_S)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            try:
                async with asyncio.timeout(min(BODY_CHUNK_TIMEOUT_S, ends_at - time.monotonic())):
                    message = await self._receive()
            except TimeoutError:
                raise ApiError(408, "The request body did not arrive in time.", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= max_bytes:
                chunks.append(chunk)
            elif size > MAX_DISCARDED_BYTES:
                break
            else:
                chunks.clear()  # read on: a client that is still sending would never see the answer
        if size > max_bytes:
            raise too_large
        return b"".join(chunks)

    # -- the answer -----------------------------------------------------------------------------------------------

    def warn(self, text: str) -> None:
        """Tells the client of something in the request that is left out of account, in a header `Warning` of the answer
        (RFC 7234, section 5.5). Only before the answer begins."""
        if len(self._warnings) < _MAX_WARNINGS:
            plain = _UNQUOTABLE.sub("?", text)[:_WARNING_LENGTH]
            self._warnings.append(f'299 llm-runtime "{plain}"'.encode())

    @property
    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        identity = self.request_id.encode()
        names = (b"x-request-id", *self._wire.identity_headers)
        return [*((name, identity) for name in names), *((b"warning", each) for each in self._warnings)]

    async def answer(self, body: bytes, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """The whole answer, a JSON document unless `headers` name another type."""
        self.status = status
        own = [(b"content-length", str(len(body)).encode()), *self._own_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": (headers or _JSON) + own})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Sends one or more complete events; waits while the client reads slowly.

        The first ones of a stream that an earlier incarnation has begun are those that it has sent.
        """
        if self._sent:
            self._sent = False
            return
        if not self.status:
            self.status = 200
            headers = [*self._wire.stream_headers, *self._own_headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    @property
    def writer(self) -> Write | None:
        """Sends further events without waiting, once a stream of events has begun."""
        write: Write | None = self.scope["state"].get("write")
        return write if self.status and not self._sent else None

    async def end(self, data: bytes = DONE) -> None:
        """Ends a stream of events."""
        await self._send({"type": "http.response.body", "body": data})

    async def fail(self, error: ApiError) -> None:
        """Answers with an error: as the response, or as the last event of a stream that has begun."""
        body = self._wire.error(error)
        if not self.status:
            headers = _JSON + error.headers
            if error.status in (408, 413) or error.code == SHUTTING_DOWN:
                headers = [*headers, (b"connection", b"close")]
            await self.answer(body, error.status, headers)
        else:
            await self.end(self._wire.last(body))

    # -- life -----------------------------------------------------------------------------------------------------

    def interrupt(self, reason: ApiError | ClientGone) -> None:
        """Ends the work on the request, wherever it is, with an error for the client or because it has gone."""
        if self._interruption is None and self._task is not None:
            self._interruption = reason
            self._task.cancel()

    async def run(self, work: Callable[[Exchange], Awaitable[None]]) -> None:
        """Does the work on the request, and answers with what it raises."""
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            try:
                await work(self)
            except asyncio.CancelledError:
                if self._interruption is None:
                    raise
                self._task.uncancel()
                raise self._interruption from None
            finally:
                self._task = None
        except ClientGone:
            pass
        except ApiError as error:
            await self.fail(error)
        except Exception:
            about = {"request": self.work.identity.rid, "request_id": self.request_id}
            logger.exception("an error in %s", self.scope["path"], extra=about)
            await self.fail(internal())

    async def disconnected(self) -> None:
        """Returns when the client has closed the connection. Only after the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
