"""POST /api/chat, /api/generate and /api/show, GET /api/tags, /api/ps and /api/version."""

from __future__ import annotations

from typing import Any

import msgspec

from actors.ingress.administration import VERSION
from actors.ingress.errors import invalid
from actors.ingress.exchange import Exchange
from actors.ingress.ollama.answers import Answer
from actors.ingress.ollama.conversion import of_chat, of_generate, served_name
from actors.ingress.ollama.protocol import ChatBody, GenerateBody, Request, ShowBody
from actors.ingress.ollama.times import timestamp
from actors.ingress.openai.requests import ChatRequest
from actors.ingress.openai.turn import open_turn
from actors.ingress.service import Prompt, Service
from actors.messages import TextPrompt

_encode = msgspec.json.encode


async def chat(service: Service, body: ChatBody, exchange: Exchange) -> None:
    """Answers a conversation; one without messages asks whether the model is loaded."""
    if not body.messages:
        served_name(service, body.model)
        await _loaded(body, exchange, {"message": {"role": "assistant", "content": ""}})
        return
    await _answer(service, body, of_chat(service, body), exchange, True, None)


async def generate(service: Service, body: GenerateBody, exchange: Exchange) -> None:
    """Answers a prompt; a request without one asks whether the model is loaded."""
    request = of_generate(service, body)
    if not body.prompt:
        await _loaded(body, exchange, {"response": ""})
        return
    await _answer(service, body, request, exchange, False, TextPrompt(body.prompt) if body.raw else None)


async def _answer(
    service: Service, body: Request, request: ChatRequest, exchange: Exchange, is_chat: bool, prompt: Prompt | None
) -> None:
    turn = await open_turn(service, request, exchange, limit_name="num_predict", cut_limit=True, prompt=prompt)
    with turn.generation as generation:
        answer = Answer(turn, is_chat, body.model, exchange.work.identity)
        if request.stream:
            await generation.stream(exchange, lambda entries: answer.lines())
            await exchange.end(b"")
            return
        await generation.progress()
        await exchange.answer(answer.document())


async def _loaded(body: Request, exchange: Exchange, part: dict[str, Any]) -> None:
    head = {"model": body.model, "created_at": timestamp(exchange.work.identity.created)}
    await exchange.answer(_encode({**head, **part, "done": True, "done_reason": "load"}))


async def tags(service: Service, exchange: Exchange) -> None:
    """All names of all models."""
    names = (name for model in service.models for name in model.served_model_names)
    await exchange.answer(_encode({"models": [_card(service, name) for name in names]}))


async def running(service: Service, exchange: Exchange) -> None:
    """The same: a model that is served is loaded."""
    cards = [
        {**_card(service, name), "context_length": model.max_model_len, "size_vram": 0}
        for model in service.models
        for name in model.served_model_names
    ]
    await exchange.answer(_encode({"models": cards}))


async def show(service: Service, body: ShowBody, exchange: Exchange) -> None:
    """What is known of the model. Raises ApiError for one that is not served."""
    name = body.model or body.name
    if not name:
        raise invalid("The request needs the name of a model.", "model")
    served_name(service, name)
    model = service.model
    capabilities = {"generate": ["completion"], "embed": ["embedding"]}.get(model.task, [])
    if model.tool_call_parser is not None:
        capabilities.append("tools")
    if model.reasoning_parser is not None:
        capabilities.append("thinking")
    document = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "modified_at": timestamp(service.created),
        "details": _details(),
        "model_info": {
            "general.basename": model.root,
            "general.architecture": "unknown",
            "unknown.context_length": model.max_model_len,
            "unknown.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities,
    }
    await exchange.answer(_encode(document))


async def get_version(service: Service, exchange: Exchange) -> None:
    """This program's version."""
    await exchange.answer(_encode({"version": VERSION}))


def _card(service: Service, name: str) -> dict[str, Any]:
    modified_at = timestamp(service.created)
    return {"name": name, "model": name, "modified_at": modified_at, "size": 0, "digest": "", "details": _details()}


def _details() -> dict[str, Any]:
    """What Ollama tells of a model's file, which this server does not know."""
    names = ("parent_model", "format", "family", "parameter_size", "quantization_level")
    return {**dict.fromkeys(names, ""), "families": []}
