"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.ingress.exchange import Exchange
from actors.ingress.service import Service


async def list_models(service: Service, exchange: Exchange) -> None:
    """All names of the model."""
    cards = [_card(service, name) for name in service.config.served_model_names]
    await exchange.answer(msgspec.json.encode({"object": "list", "data": cards}))


async def get_model(service: Service, exchange: Exchange) -> None:
    """One name of the model. Raises ApiError for a name that is not served."""
    name = service.check_model(exchange.scope["path_params"]["model"])
    await exchange.answer(msgspec.json.encode(_card(service, name)))


def _card(service: Service, name: str) -> dict[str, Any]:
    config = service.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "runtime",
        "root": config.model or config.served_model_names[0],
        "max_model_len": config.max_model_len,
    }
