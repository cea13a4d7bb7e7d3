"""GET / and /status: a page that shows the node live, and the supervision tree that it shows.

The page is one file without anything from elsewhere. Figures it takes from /metrics, the tree from /status, for which
it asks for the API key if there is one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from pathlib import Path

import msgspec

from actors.ingress.errors import ApiError
from actors.ingress.exchange import Exchange
from actors.ingress.service import Service

ANSWER_TIMEOUT_S = 2.0
FRESH_S = 0.2
"""A tree is told again to others who ask within so many seconds."""

_PAGE = Path(__file__).with_name("status_page.html").read_bytes()


def _sources(tag: bytes) -> str:
    """The content of the page's only element of this name, as a source that a content security policy allows."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), _PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


_POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_sources(b'script')}",
        f"style-src {_sources(b'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", _POLICY.encode()),
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


async def page(service: Service, exchange: Exchange) -> None:
    """The page. It holds nothing about the node, so no key is asked for."""
    await exchange.answer(_PAGE, headers=_HEADERS)


class NodeStatus:
    """Answers with the node and its tree, as `runtime status --json` prints them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._told_at = 0.0
        self._told = b""

    async def __call__(self, service: Service, exchange: Exchange) -> None:
        """Raises ApiError when the node cannot be asked."""
        path = service.config.status_socket
        if not path:
            raise ApiError(404, "This server does not know the processes of its node.")
        async with self._lock:
            if time.monotonic() - self._told_at > FRESH_S:
                self._told = await _ask(path)
                self._told_at = time.monotonic()
        await exchange.answer(self._told)


async def _ask(path: str) -> bytes:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                answer = await reader.read()
            finally:
                writer.close()
        msgspec.json.decode(answer)  # all of it
    except (OSError, TimeoutError, msgspec.DecodeError):
        raise ApiError(503, "The node does not say what its processes do.", retry_after_s=1.0) from None
    return answer
