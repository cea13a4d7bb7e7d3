"""GET /: a page that shows the node live.

It is sent as one document without anything from elsewhere. What it shows comes from the endpoints in `node_status`, for
which it asks for a key if there is one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Service

_HERE = Path(__file__)
_PAGE = b"".join(_HERE.with_name(f"status_page{part}.html").read_bytes() for part in ("", "_script"))


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
