"""What Ollama's clients ask about models: GET /api/tags, /api/ps and /api/version, POST /api/show and /api/pull."""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec

from llm_runtime.actors.checkpoint import CheckpointFacts
from llm_runtime.actors.ingress.administration import VERSION
from llm_runtime.actors.ingress.config import ServedModel
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.ollama.conversion import served_name
from llm_runtime.actors.ingress.ollama.protocol import PullBody, ShowBody
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.ingress.times import timestamp

_encode = msgspec.json.encode

_NEVER = "2318-01-01T00:00:00Z"
"""When a model leaves the memory: Ollama's date for one that stays."""
_UNITS = ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K"))


async def tags(service: Service, exchange: Exchange) -> None:
    """All names of all models."""
    cards = [_card(service, model, name) for model in service.models for name in model.served_model_names]
    await exchange.answer(_encode({"models": cards}))


async def running(service: Service, exchange: Exchange) -> None:
    """The same: a model that is served is loaded."""
    cards = [
        {
            **_card(service, model, name),
            "expires_at": _NEVER,
            "context_length": model.max_model_len,
            "size_vram": 0,
        }
        for model in service.models
        for name in model.served_model_names
    ]
    await exchange.answer(_encode({"models": cards}))


async def show(service: Service, body: ShowBody, exchange: Exchange) -> None:
    """What is known of the model. Raises ApiError for one that is not served."""
    served_name(service, body.asked)
    model = service.model
    described = await service.tokenization.description()
    capabilities = {"generate": ["completion"], "embed": ["embedding"]}.get(model.task, [])
    if model.tool_call_parser is not None:
        capabilities.append("tools")
    if model.reasoning_parser is not None:
        capabilities.append("thinking")
    architecture = model.files.architecture or "unknown"
    document = {
        "modelfile": f"FROM {model.root}\nPARAMETER num_ctx {model.max_model_len}\n",
        "parameters": f"num_ctx {model.max_model_len}",
        "template": described.chat_templates.get("default", ""),
        "modified_at": _modified_at(service, model.files),
        "details": _details(model.files),
        "model_info": {
            "general.architecture": architecture,
            "general.basename": model.root,
            **model.files.metadata,
            f"{architecture}.context_length": model.max_model_len,
            f"{architecture}.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities,
    }
    await exchange.answer(_encode(document))


async def pull(service: Service, body: PullBody, exchange: Exchange) -> None:
    """Says that the model is there. Raises ApiError for one that is not served: models are chosen at the start."""
    served_name(service, body.asked)
    if body.stream is False:
        await exchange.answer(_encode({"status": "success"}))
        return
    await exchange.events(b'{"status":"pulling manifest"}\n{"status":"success"}\n')
    await exchange.end(b"")


async def unmanaged(service: Service, exchange: Exchange) -> NoReturn:
    """Models are not made, copied, sent or deleted over HTTP."""
    raise ApiError(
        404, "This server's models are chosen when it starts: see 'runtime up --help'. They are not managed over HTTP."
    )


async def get_version(service: Service, exchange: Exchange) -> None:
    """This program's version."""
    await exchange.answer(_encode({"version": VERSION}))


def _card(service: Service, model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _modified_at(service, model.files),
        "size": model.files.size,
        "digest": model.files.digest,
        "details": _details(model.files),
    }


def _modified_at(service: Service, files: CheckpointFacts) -> str:
    return timestamp(files.modified_at or service.created)


def _details(files: CheckpointFacts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": files.format,
        "family": files.architecture,
        "families": [files.architecture] if files.architecture else [],
        "parameter_size": _rounded(files.parameters),
        "quantization_level": files.type,
    }


def _rounded(count: int) -> str:
    """A number as Ollama writes it: 134.52M, 8.0B."""
    for unit, letter in _UNITS:
        if count >= unit:
            return f"{count / unit:.{1 if letter == 'B' else 2}f}{letter}"
    return str(count) if count else ""
