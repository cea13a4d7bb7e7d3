"""Who may ask for what: keys, and what browsers say of the page that asks."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Sequence

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange

ANY = "*"
_LOCAL = (".localhost", ".local", ".internal")
"""Ends of names that nobody can register."""


class Access:
    """The rules of a server.

    Args:
        api_key: of clients; None lets everybody in.
        admin_api_key: of administrators; with None their endpoints take what clients send.
        origins: web pages of other servers that may ask, as browsers name them; `*` for all.
        hosts: names under which this server is asked, besides those of this machine; None or `*` for any.
    """

    def __init__(
        self,
        api_key: str | None,
        admin_api_key: str | None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
    ) -> None:
        self._key = api_key.encode() if api_key is not None else None
        self._admin_key = admin_api_key.encode() if admin_api_key is not None else None
        self._origins = {each.rstrip("/").lower() for each in origins}
        self._hosts = None if hosts is None or ANY in hosts else {each.lower() for each in hosts}

    def check(self, exchange: Exchange, *, public: bool = False, admin: bool = False) -> None:
        """Raises ApiError unless the request may be answered.

        Args:
            public: everybody may ask.
            admin: only administrators may.
        """
        self._check_host(exchange.header(b"host").decode("latin-1"))
        if public:
            return
        given = _key_of(exchange)
        is_admin = self._admin_key is not None and hmac.compare_digest(given, self._admin_key)
        is_client = self._key is not None and hmac.compare_digest(given, self._key)
        if is_admin:
            return
        if admin and self._admin_key is not None:
            if is_client:
                raise ApiError(403, "This needs the administrators' key, not that of clients.", code="forbidden")
            raise ApiError(
                401, "Incorrect key: send the administrators' as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
        if self._key is None:
            self._check_page(exchange)
        elif not is_client:
            raise ApiError(
                401, "Incorrect API key provided: send it as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )

    def _check_host(self, host: str) -> None:
        """A page whose name has been made to lead to this machine is for its browser a page of this server."""
        if self._hosts is None or not host:
            return
        name = _name_of(host)
        if name not in self._hosts and not _is_local(name):
            raise ApiError(
                403, f"This server is not asked under the name '{name}': add it to ingress.allowed_hosts.", code="host"
            )

    def _check_page(self, exchange: Exchange) -> None:
        """Without a key, any page in a browser on this machine could ask."""
        origin = exchange.header(b"origin").decode("latin-1").lower()
        if ANY in self._origins or origin in self._origins:
            return
        if origin:
            if origin.partition("://")[2] == exchange.header(b"host").decode("latin-1").lower():
                return
        elif exchange.header(b"sec-fetch-site") not in (b"cross-site", b"same-site"):
            return
        who = f"The page at '{origin}'" if origin else "A page of another server"
        raise ApiError(403, f"{who} may not ask: add its origin to ingress.cors_origins.", code="origin")


def _key_of(exchange: Exchange) -> bytes:
    scheme, _, key = exchange.header(b"authorization").partition(b" ")
    if scheme.lower() != b"bearer":
        key = exchange.header(b"x-api-key")  # Anthropic's
    return key.strip()


def _name_of(host: str) -> str:
    """A Host header's name, without port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_local(name: str) -> bool:
    """Whether a name cannot be somebody else's: an address, one of this machine, or one without a domain."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_LOCAL) or name == socket.gethostname().lower()
    return True
