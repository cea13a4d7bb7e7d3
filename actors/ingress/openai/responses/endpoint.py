"""POST /v1/responses."""

from __future__ import annotations

from actors.ingress.exchange import Exchange
from actors.ingress.openai.responses.answers import Answer
from actors.ingress.openai.responses.conversion import chat_request
from actors.ingress.openai.responses.protocol import ResponsesRequest
from actors.ingress.openai.turn import open_turn
from actors.ingress.service import Service


async def responses(service: Service, request: ResponsesRequest, exchange: Exchange) -> None:
    """Answers with a response, as one document or as a stream of events."""
    turn = await open_turn(service, chat_request(request), exchange, limit_name="max_output_tokens")
    with turn.generation as generation:
        answer = Answer(turn, request, exchange.work.identity)
        if request.stream:
            await generation.stream(exchange, lambda entries: answer.parts())
            await exchange.end(b"")
            return
        await generation.progress()
        await exchange.answer(answer.document())
