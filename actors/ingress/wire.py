"""What protocols differ in whatever the endpoint: how they write errors and streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from llm_runtime.actors.ingress.errors import ApiError

_UNCACHED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), *_UNCACHED]
_LINES = [(b"content-type", b"application/x-ndjson"), *_UNCACHED]

_encode = msgspec.json.encode


class Wire(NamedTuple):
    """A protocol's way to write.

    Attributes:
        error: the document of an error.
        last: an error as the last part of a stream that has begun, made of its document.
        stream_headers: of a streamed answer.
        any_type: requests need not say that they are JSON, for the protocol's clients do not; but browsers' must.
        identity_headers: further names under which clients look for `X-Request-Id`.
    """

    error: Callable[[ApiError], bytes]
    last: Callable[[bytes], bytes]
    stream_headers: list[tuple[bytes, bytes]] = _EVENTS
    any_type: bool = False
    identity_headers: tuple[bytes, ...] = ()


_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _anthropic_error(error: ApiError) -> bytes:
    kind = _ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    details = {} if error.details is None else {"details": error.details}
    return _encode({"type": "error", "error": {"type": kind, "message": error.message, **details}})


def _response_error(error: bytes) -> bytes:
    """The event in which a stream of a response ends early."""
    of = msgspec.json.decode(error)["error"]
    event = {"type": "error", "code": of["code"], "message": of["message"], "param": of["param"]}
    # Beyond every number that the stream can have had: it counts characters.
    return b"event: error\ndata: %s\n\n" % _encode({**event, "sequence_number": 2**31 - 1})


OPENAI = Wire(lambda error: error.body, lambda body: b"data: %s\n\n" % body)
RESPONSES = Wire(OPENAI.error, _response_error)
ANTHROPIC = Wire(_anthropic_error, lambda body: b"event: error\ndata: %s\n\n" % body, identity_headers=(b"request-id",))
OLLAMA = Wire(lambda error: _encode({"error": error.message}), lambda body: body + b"\n", _LINES, any_type=True)


def wire_of(path: bytes) -> Wire:
    """The protocol that a path belongs to, whether there is such an endpoint or not."""
    if path.startswith(b"/v1/messages"):
        return ANTHROPIC
    return OLLAMA if path.startswith(b"/api/") else OPENAI
