"""What can be asked of the responses that are stored."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import ApiError, from_decoding, invalid, unsupported
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.openai.responses.store import Stored
from llm_runtime.actors.ingress.service import Service

_encode = msgspec.json.encode


class Page(Struct):
    """Which items of a list are asked for."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


async def get_response(service: Service, exchange: Exchange) -> None:
    """A stored response."""
    if _query(exchange).get("stream", "false") != "false":
        raise unsupported("stream", "A stream of a stored response")
    await exchange.answer(_encode(_stored(service, exchange)[1].response))


async def delete_response(service: Service, exchange: Exchange) -> None:
    """Forgets a stored response."""
    identity, _ = _stored(service, exchange)
    service.responses.delete(identity)
    await exchange.answer(_encode({"id": identity, "object": "response", "deleted": True}))


async def input_items(service: Service, exchange: Exchange) -> None:
    """The conversation before a stored response, the newest item first unless `order` is asc."""
    try:
        asked = msgspec.convert(_query(exchange), Page, strict=False)
    except msgspec.ValidationError as error:
        raise from_decoding(error) from None
    _, stored = _stored(service, exchange)
    items = stored.items if asked.order == "asc" else stored.items[::-1]
    if asked.after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == asked.after), None)
        if place is None:
            raise invalid(f"Invalid value for 'after': there is no item '{asked.after}'.", "after", "invalid_value")
        items = items[place + 1 :]
    page = items[: asked.limit]
    document = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }
    await exchange.answer(_encode(document))


def _query(exchange: Exchange) -> dict[str, str]:
    return dict(parse_qsl(exchange.scope["query_string"].decode("latin-1")))


def _stored(service: Service, exchange: Exchange) -> tuple[str, Stored]:
    identity: str = exchange.scope["path_params"]["response_id"]
    stored = service.responses.get(identity)
    if stored is None:
        raise ApiError(404, f"Response with id '{identity}' not found.", "response_id", "response_not_found")
    return identity, stored
