"""GET /v1/models and /v1/models/{id}, for the clients of OpenAI and of Anthropic."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_runtime.actors.ingress.config import ServedModel
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.ingress.times import timestamp


async def list_models(service: Service, exchange: Exchange) -> None:
    """All names of all models."""
    cards = [_card(service, model, name) for model in service.models for name in model.served_model_names]
    names = [card["id"] for card in cards]
    pages = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    await exchange.answer(msgspec.json.encode({"object": "list", "data": cards, **pages}))


async def get_model(service: Service, exchange: Exchange) -> None:
    """One name of the model. Raises ApiError for a name that is not served."""
    wanted = exchange.scope["path_params"]["model"]
    service = service.about(wanted)
    name = service.check_model(wanted)
    await exchange.answer(msgspec.json.encode(_card(service, service.model, name)))


def _card(service: Service, model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "runtime",
        "root": model.root,
        "max_model_len": model.max_model_len,
        # Anthropic's
        "type": "model",
        "display_name": name,
        "created_at": timestamp(service.created),
        "max_input_tokens": model.max_model_len,
        "max_tokens": model.max_model_len,
    }
