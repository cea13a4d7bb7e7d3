"""POST /api/chat and /api/generate."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.ollama.answers import Answer
from llm_runtime.actors.ingress.ollama.conversion import of_chat, of_generate, served_name
from llm_runtime.actors.ingress.ollama.protocol import ChatBody, GenerateBody, Request
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.turn import open_turn
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.ingress.times import timestamp
from llm_runtime.actors.messages import FillPrompt, TextPrompt

_encode = msgspec.json.encode


async def chat(service: Service, body: ChatBody, exchange: Exchange) -> None:
    """Answers a conversation; one without messages asks whether the model is loaded."""
    if not body.messages:
        served_name(service, body.model)
        await _loaded(body, exchange, {"message": {"role": "assistant", "content": ""}})
        return
    await _answer(service, body, of_chat(service, body, exchange.warn), exchange, True)


async def generate(service: Service, body: GenerateBody, exchange: Exchange) -> None:
    """Answers a prompt; a request without one asks whether the model is loaded."""
    request = of_generate(service, body, exchange.warn)
    if not body.prompt:
        await _loaded(body, exchange, {"response": ""})
        return
    context = body.context or []
    service.check_token_ids(context, "context")
    prompt: Prompt | None = TextPrompt(body.prompt) if body.raw else None
    if body.suffix:
        ((tokens, ends),) = await service.tokenize_pairs(exchange, [FillPrompt(body.prompt, body.suffix)])
        prompt, request.stop_token_ids = array("i", tokens).tolist(), array("i", ends).tolist()
    await _answer(service, body, request, exchange, False, prompt, array("i", context).tobytes())


async def _answer(
    service: Service,
    body: Request,
    request: ChatRequest,
    exchange: Exchange,
    is_chat: bool,
    prompt: Prompt | None = None,
    context: bytes = b"",
) -> None:
    turn = await open_turn(
        service, request, exchange, limit_name="num_predict", cut_limit=True, prompt=prompt, context=context
    )
    with turn.generation as generation:
        gives_context = not is_chat and prompt is None
        answer = Answer(turn, is_chat, body.model, exchange.work.identity, gives_context)
        if request.stream:
            await generation.stream(exchange, lambda entries: answer.lines())
            await exchange.end(b"")
            return
        await generation.progress()
        await exchange.answer(answer.document())


async def _loaded(body: Request, exchange: Exchange, part: dict[str, Any]) -> None:
    head = {"model": body.model, "created_at": timestamp(exchange.work.identity.created)}
    await exchange.answer(_encode({**head, **part, "done": True, "done_reason": "load"}))
