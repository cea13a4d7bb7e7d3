"""POST /v1/responses."""

from __future__ import annotations

from typing import Any

from llm_runtime.actors.ingress.errors import unsupported
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.openai.responses.answers import Answer
from llm_runtime.actors.ingress.openai.responses.conversion import chat_request, items_of
from llm_runtime.actors.ingress.openai.responses.protocol import ResponsesRequest
from llm_runtime.actors.ingress.openai.responses.store import Stored
from llm_runtime.actors.ingress.openai.responses.truncation import truncate
from llm_runtime.actors.ingress.openai.turn import open_turn
from llm_runtime.actors.ingress.service import Service


async def responses(service: Service, request: ResponsesRequest, exchange: Exchange) -> None:
    """Answers with a response, as one document or as a stream of events."""
    store, rid = service.responses, exchange.work.identity.rid
    if request.store and not store.on:
        raise unsupported("store", "store = true (ingress.response_store_bytes is 0)")
    stored = store.on and request.store is not False
    try:
        items = items_of(request, store, rid)
        chat = chat_request(request, items, exchange.warn)
        if request.truncation == "auto":
            await truncate(service, exchange, chat)
        turn = await open_turn(service, chat, exchange, limit_name="max_output_tokens")

        def keep(response: dict[str, Any]) -> None:
            if stored:
                store.save(response["id"], Stored(response, [_named(item, rid, i) for i, item in enumerate(items)]))

        with turn.generation as generation:
            answer = Answer(turn, request, exchange.work.identity, stored, keep)
            if request.stream:
                await generation.stream(exchange, lambda entries: answer.parts())
                await exchange.end(b"")
                return
            await generation.progress()
            await exchange.answer(answer.document())
    finally:
        store.release(rid)


def _named(item: dict[str, Any], rid: str, place: int) -> dict[str, Any]:
    """An input item with an identity and a type, as it is listed."""
    return {
        "id": f"in_{rid}_{place}",
        "type": "message",
        **{key: value for key, value in item.items() if value is not None},
    }
