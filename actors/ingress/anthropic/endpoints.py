"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import msgspec

from actors.ingress.anthropic.answers import Answer
from actors.ingress.anthropic.conversion import chat_request
from actors.ingress.anthropic.protocol import CountRequest, MessagesRequest
from actors.ingress.exchange import Exchange
from actors.ingress.openai.tools import callable_tools
from actors.ingress.openai.turn import conversation, open_turn
from actors.ingress.service import Service


async def messages(service: Service, request: MessagesRequest, exchange: Exchange) -> None:
    """Answers a conversation, as one document or as a stream of events."""
    chat = chat_request(request)
    if service.model.reasoning_parser is None:
        chat.thinking_budget = None  # clients must send one to whatever model, and there is no thinking to tell apart
    turn = await open_turn(service, chat, exchange, cut_limit=True)
    with turn.generation as generation:
        answer = Answer(turn, exchange.work.identity.rid, turn.max_tokens < request.max_tokens)
        if request.stream:
            await generation.stream(exchange, lambda entries: answer.parts())
            await exchange.end(b"")
            return
        await generation.progress()
        await exchange.answer(answer.document())


async def count_tokens(service: Service, request: CountRequest, exchange: Exchange) -> None:
    """Answers with the length of a prompt."""
    chat = chat_request(request)
    service.check_model(request.model)
    tools = callable_tools(chat.tools, chat.tool_choice)
    (tokens,) = await service.tokenize(exchange, [conversation(service.model, chat, tools)])
    await exchange.answer(msgspec.json.encode({"input_tokens": len(tokens) // 4}))
