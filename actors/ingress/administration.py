"""What operators ask: SGLang's /v1/load, /model_info and /server_info, also under their former names, /flush_cache and
/abort_request, and vLLM's /load and /version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qs

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from llm_runtime.actors.ingress.config import ServedModel
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import EngineInfo

VERSION = version("llm-runtime")

_encode = msgspec.json.encode


class AbortBody(Struct, forbid_unknown_fields=True):
    """Body of POST /abort_request."""

    rid: str = ""
    abort_all: bool = False


async def abort_request(service: Service, body: AbortBody, exchange: Exchange) -> None:
    """Ends requests, whichever worker has them; answers without waiting for that. Their clients get what there is."""
    if bool(body.rid) == body.abort_all:
        raise invalid("Send either 'rid' or abort_all = true.", "rid")
    if body.abort_all:
        service.access.check(exchange, admin=True)
    service.end(body.rid)
    service.control.end_elsewhere(body.rid)
    await exchange.answer(b"{}")


async def flush_cache(service: Service, exchange: Exchange) -> None:
    """Answers when all engines have forgotten what they had cached. Raises ApiError where requests are running."""
    schedulers = []
    if any(model.task == "generate" for model in service.models):
        schedulers = [info.scheduler for info in await service.known_engines()]
    refusals = await service.control.flush(schedulers)
    if refusals:
        raise invalid(f"The cache is not flushed: {' '.join(refusals)}")
    await exchange.answer(b"Cache flushed.\n", headers=[(b"content-type", b"text/plain; charset=utf-8")])


async def load(service: Service, exchange: Exchange) -> None:
    """Requests in progress in this worker."""
    await exchange.answer(_encode({"server_load": len(service.in_progress)}))


async def get_load(service: Service, exchange: Exchange) -> None:
    """Each engine's load."""
    infos = service.ledger.engines.infos
    await exchange.answer(_encode([_load(service, rank, info) for rank, info in enumerate(infos)]))


async def get_model_info(service: Service, exchange: Exchange) -> None:
    """What is served: of several models the first, or the one that `?model=` names."""
    model = asked_model(service, exchange).model
    document = {
        "model_path": model.root,
        "tokenizer_path": model.root,
        "is_generation": model.task == "generate",
        "preferred_sampling_params": _preferred(model),
        "weight_version": "default",
        "max_model_len": model.max_model_len,
    }
    await exchange.answer(_encode(document))


async def get_server_info(service: Service, exchange: Exchange) -> None:
    """How it is served: settings that are no secret, of the model as above, and each engine with its figures."""
    model = asked_model(service, exchange).model
    document = {
        "model_path": model.root,
        "served_model_name": model.name,
        "context_length": model.max_model_len,
        "tool_call_parser": model.tool_call_parser,
        "reasoning_parser": model.reasoning_parser,
        "version": VERSION,
        "internal_states": [_engine(service, info) for info in service.ledger.engines.infos],
    }
    await exchange.answer(_encode(document))


async def get_version(service: Service, exchange: Exchange) -> None:
    """This program's version."""
    await exchange.answer(_encode({"version": VERSION}))


def _preferred(model: ServedModel) -> dict[str, Any] | None:
    """How tokens are drawn for requests that do not say it."""
    given = {name: value for name, value in asdict(model.sampling).items() if value is not None}
    return given or None


def asked_model(service: Service, exchange: Exchange) -> Service:
    """The service for the model that `?model=` names, else the first. Raises ApiError for one that is not served."""
    (name, *_) = parse_qs(exchange.scope["query_string"].decode("latin-1")).get("model", [None])
    service = service.about(name)
    service.check_model(name)
    return service


def _load(service: Service, rank: int, info: EngineInfo) -> dict[str, Any]:
    usage = service.actors.of(info.scheduler).get("token_usage", 0.0)
    return {
        "dp_rank": rank,
        "engine": info.engine,
        "num_reqs": info.waiting + info.running,
        "num_waiting_reqs": info.waiting,
        "num_tokens": round(usage * info.num_pages) * info.page_size,
    }


def _engine(service: Service, info: EngineInfo) -> dict[str, Any]:
    return {
        "engine": info.engine,
        "role": info.role,
        "tp_size": info.tp,
        "page_size": info.page_size,
        "max_total_num_tokens": info.num_pages * info.page_size,
        "figures": service.actors.of(info.scheduler),
    }
