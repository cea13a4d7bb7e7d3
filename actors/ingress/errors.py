"""Errors that clients see, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

_TYPES = {408: "timeout_error", 429: "rate_limit_error"}
_PATH = re.compile(
    r"^(?P<reason>.*?)(?: - at `(?P<path>[^`]*)`| - at `(?P<kind>key|value)` in `(?P<container>[^`]*)`)$"
)
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)


MAX_MESSAGE = 2000
"""Characters of a message, which may repeat what the client has sent."""


class ApiError(Exception):
    """A request cannot be served.

    Args:
        status: HTTP status.
        message: a sentence for the client that says what to do.
        param: the request's field that is wrong.
        code: OpenAI's machine-readable name of the error.
        retry_after_s: when the client should try again; 0 to say nothing.
        details: what Anthropic's clients read of an error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 0.0,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _short(message, MAX_MESSAGE)
        self.param = None if param is None else _short(param, MAX_MESSAGE // 2)
        self.code = code
        self.retry_after_s = retry_after_s
        self.details = details

    @property
    def body(self) -> bytes:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers that belong to the status."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.code == "unknown_content_encoding":
            return [(b"accept-encoding", b"gzip, deflate")]
        if self.retry_after_s > 0:
            return [(b"retry-after", str(math.ceil(self.retry_after_s)).encode())]
        return []


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's request is wrong: status 400."""
    return ApiError(400, message, param, code)


def unsupported(param: str, what: str | None = None) -> ApiError:
    """The request asks for a feature that this server does not have."""
    return invalid(f"{what or repr(param)} is not supported by this server.", param, "unsupported_parameter")


def internal() -> ApiError:
    """An error of the server itself; what happened is in its log."""
    return ApiError(500, "The server had an error while processing your request.", code="internal_error")


def from_decoding(error: Exception, within: str | None = None) -> ApiError:
    """What was wrong with a JSON body, or with what is `within` a place in it, from the exception of its decoding."""
    if isinstance(error, RecursionError):
        return invalid("The request body is nested too deeply.")
    if not isinstance(error, msgspec.ValidationError):
        return invalid(f"The request body is not valid JSON: {error}.")
    text = str(error)
    match = _PATH.match(text)
    reason, param = text, None
    if match is not None:
        reason = match["reason"]
        path = match["path"] or match["container"] or ""
        param = path.replace("[...]", "").removeprefix("$").removeprefix(".") or None
    if within is not None:
        param = within if param is None else f"{within}.{param}"
    unknown = _UNKNOWN_FIELD.match(reason)
    if unknown is not None:
        field = unknown["field"] if param is None else f"{param}.{unknown['field']}"
        return invalid(f"Unrecognized request argument supplied: {field}", field, "unknown_parameter")
    if param is None:
        return invalid(f"Invalid request body: {reason}.")
    return invalid(f"Invalid value for '{param}': {reason[:1].lower()}{reason[1:]}.", param, "invalid_value")
