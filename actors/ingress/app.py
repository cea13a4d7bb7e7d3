"""The routes, as a Starlette application whose endpoints are plain ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llm_runtime.actors.checkpoint.pooling import Task
from llm_runtime.actors.ingress import administration as admin
from llm_runtime.actors.ingress.anthropic.endpoints import batches, count_tokens, messages
from llm_runtime.actors.ingress.anthropic.protocol import CountRequest, MessagesRequest
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange, request_id
from llm_runtime.actors.ingress.health import HealthGenerate, health, metrics
from llm_runtime.actors.ingress.native import GenerateRequest, generate
from llm_runtime.actors.ingress.node_status import NodeStatus, RestartBody, actor_log, history, requests, restart
from llm_runtime.actors.ingress.observation import observed
from llm_runtime.actors.ingress.ollama import endpoints as ollama
from llm_runtime.actors.ingress.ollama import models as ollama_models
from llm_runtime.actors.ingress.ollama.embeddings import embed
from llm_runtime.actors.ingress.ollama.embeddings import embeddings as former_embeddings
from llm_runtime.actors.ingress.ollama.protocol import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    Named,
    PullBody,
    ShowBody,
)
from llm_runtime.actors.ingress.openai.chat import chat_completions
from llm_runtime.actors.ingress.openai.completions import CompletionRequest, completions
from llm_runtime.actors.ingress.openai.embeddings import EmbeddingsRequest, embeddings
from llm_runtime.actors.ingress.openai.models import get_model, list_models
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.responses.endpoint import responses
from llm_runtime.actors.ingress.openai.responses.protocol import ResponsesRequest
from llm_runtime.actors.ingress.openai.responses.stored import delete_response, get_response, input_items
from llm_runtime.actors.ingress.openapi import Description
from llm_runtime.actors.ingress.pooling.classify import ClassifyRequest, classify
from llm_runtime.actors.ingress.pooling.score import RerankRequest, ScoreRequest, rerank, score
from llm_runtime.actors.ingress.profiling import StartProfileBody, StopProfileBody, start_profile, stop_profile
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.ingress.status_page import page
from llm_runtime.actors.ingress.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize, tokenizer_info
from llm_runtime.actors.ingress.wire import ANTHROPIC, OLLAMA, OPENAI, RESPONSES, Wire, wire_of

T = TypeVar("T")

# Made before the worker's process is forked, so that it starts at once.
TASKS: tuple[Task, ...] = ("generate", "embed", "classify")
"""All of them, for endpoints that do not care."""

_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsRequest)
_RERANK = msgspec.json.Decoder(RerankRequest)
_SCORE = msgspec.json.Decoder(ScoreRequest)
_CLASSIFY = msgspec.json.Decoder(ClassifyRequest)
_CHAT = msgspec.json.Decoder(ChatRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_ABORT = msgspec.json.Decoder(admin.AbortBody)
_MESSAGES = msgspec.json.Decoder(MessagesRequest)
_COUNT = msgspec.json.Decoder(CountRequest)
_RESPONSES = msgspec.json.Decoder(ResponsesRequest)
_OLLAMA_CHAT = msgspec.json.Decoder(ChatBody)
_OLLAMA_GENERATE = msgspec.json.Decoder(GenerateBody)
_OLLAMA_SHOW = msgspec.json.Decoder(ShowBody)
_OLLAMA_PULL = msgspec.json.Decoder(PullBody)
_OLLAMA_EMBED = msgspec.json.Decoder(EmbedBody)
_OLLAMA_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsBody)
_GENERATE = msgspec.json.Decoder(GenerateRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_START_PROFILE = msgspec.json.Decoder(StartProfileBody)
_STOP_PROFILE = msgspec.json.Decoder(StopProfileBody)
_RESTART = msgspec.json.Decoder(RestartBody)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


class Post(Generic[T]):
    """An endpoint that takes a JSON document, of models for some tasks. `default`: the one that is meant by a request
    without a body. `admin`: one for administrators alone."""

    public = False

    def __init__(
        self,
        service: Service,
        decoder: msgspec.json.Decoder[T],
        handle: Callable[[Service, T, Exchange], Awaitable[None]],
        wire: Wire = OPENAI,
        default: bytes = b"",
        tasks: Sequence[Task] = ("generate",),
        admin: bool = False,
    ) -> None:
        self._service = service
        self._decoder = decoder
        self._tasks = tasks
        self._admin = admin
        self.handle = handle
        body: Any = decoder.type  # msgspec 0.23 says TypeForm, versions before it say type
        self.body: type[T] = body
        self.wire = wire
        self.default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.wire)
        with observed(self._service, exchange):
            await exchange.run(self._work)

    async def _work(self, exchange: Exchange) -> None:
        service = self._service
        service.access.check(exchange, admin=self._admin)
        service.check_open(exchange)
        request = await exchange.body(self._decoder, service.config.max_body_bytes, self.default)
        service = service.about(_model_named(request), self._tasks)
        exchange.model = service.model.name
        service.check_task(self._tasks)
        service.check_priority(exchange, getattr(request, "priority", None))
        with service.admitted(exchange):
            await self.handle(service, request, exchange)


class Get:
    """An endpoint without a request document. `public`: no API key is asked for. `admin`: for administrators alone.
    `of_page`: the status page asks it again and again."""

    body = None
    default = b""

    def __init__(
        self,
        service: Service,
        handle: Callable[[Service, Exchange], Awaitable[None]],
        public: bool = False,
        admin: bool = False,
        wire: Wire = OPENAI,
        of_page: bool = False,
    ) -> None:
        self._service = service
        self.handle = handle
        self.public = public
        self._of_page = of_page
        self.wire = wire
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.wire)
        with observed(self._service, exchange, self.public or self._of_page, not self._of_page):
            await exchange.run(self._work)

    async def _work(self, exchange: Exchange) -> None:
        self._service.access.check(exchange, public=self.public, admin=self._admin)
        if not self.public:
            self._service.check_open(exchange)
        await self.handle(self._service, exchange)


def _model_named(request: object) -> str | None:
    """The model that a request asks for, in whatever protocol; None if it leaves that open."""
    return getattr(request, "model", None) or (request.name if isinstance(request, Named) else None)


def create_app(service: Service) -> Starlette:
    """The application of one ingress worker."""
    app = Starlette(
        routes=[
            Route("/", Get(service, page, public=True), methods=["GET"]),
            Route("/status", Get(service, NodeStatus(), of_page=True), methods=["GET"]),
            Route("/status/history", Get(service, history, of_page=True), methods=["GET"]),
            Route("/status/requests", Get(service, requests, admin=True, of_page=True), methods=["GET"]),
            Route("/status/logs", Get(service, actor_log, admin=True, of_page=True), methods=["GET"]),
            Route("/status/restart", Post(service, _RESTART, restart, tasks=TASKS, admin=True), methods=["POST"]),
            Route("/v1/chat/completions", Post(service, _CHAT, chat_completions), methods=["POST"]),
            Route("/v1/completions", Post(service, _COMPLETION, completions), methods=["POST"]),
            Route("/v1/models", Get(service, list_models), methods=["GET"]),
            Route("/v1/models/{model:path}", Get(service, get_model), methods=["GET"]),
            *(
                Route(path, Post(service, _EMBEDDINGS, embeddings, tasks=("embed",)), methods=["POST"])
                for path in ("/v1/embeddings", "/embeddings")
            ),
            *(
                Route(path, Post(service, _RERANK, rerank, tasks=("embed", "classify")), methods=["POST"])
                for path in ("/v1/rerank", "/v2/rerank", "/rerank")
            ),
            *(
                Route(path, Post(service, _SCORE, score, tasks=("embed", "classify")), methods=["POST"])
                for path in ("/v1/score", "/score")
            ),
            *(
                Route(path, Post(service, _CLASSIFY, classify, tasks=("classify",)), methods=["POST"])
                for path in ("/v1/classify", "/classify")
            ),
            Route("/v1/responses", Post(service, _RESPONSES, responses, RESPONSES), methods=["POST"]),
            Route("/v1/responses/{response_id}", Get(service, get_response), methods=["GET"]),
            Route("/v1/responses/{response_id}", Get(service, delete_response), methods=["DELETE"]),
            Route("/v1/responses/{response_id}/input_items", Get(service, input_items), methods=["GET"]),
            Route("/v1/messages", Post(service, _MESSAGES, messages, ANTHROPIC), methods=["POST"]),
            Route("/v1/messages/count_tokens", Post(service, _COUNT, count_tokens, ANTHROPIC), methods=["POST"]),
            *(
                Route(path, Get(service, batches, wire=ANTHROPIC), methods=["GET", "POST", "DELETE"])
                for path in ("/v1/messages/batches", "/v1/messages/batches/{batch:path}")
            ),
            Route("/api/chat", Post(service, _OLLAMA_CHAT, ollama.chat, OLLAMA), methods=["POST"]),
            Route("/api/generate", Post(service, _OLLAMA_GENERATE, ollama.generate, OLLAMA), methods=["POST"]),
            Route("/api/embed", Post(service, _OLLAMA_EMBED, embed, OLLAMA, tasks=("embed",)), methods=["POST"]),
            Route(
                "/api/embeddings",
                Post(service, _OLLAMA_EMBEDDINGS, former_embeddings, OLLAMA, tasks=("embed",)),
                methods=["POST"],
            ),
            Route("/api/show", Post(service, _OLLAMA_SHOW, ollama_models.show, OLLAMA, tasks=TASKS), methods=["POST"]),
            Route("/api/pull", Post(service, _OLLAMA_PULL, ollama_models.pull, OLLAMA, tasks=TASKS), methods=["POST"]),
            Route("/api/tags", Get(service, ollama_models.tags, wire=OLLAMA), methods=["GET"]),
            Route("/api/ps", Get(service, ollama_models.running, wire=OLLAMA), methods=["GET"]),
            Route("/api/version", Get(service, ollama_models.get_version, wire=OLLAMA), methods=["GET"]),
            *(
                Route(f"/api/{what}", Get(service, ollama_models.unmanaged, wire=OLLAMA), methods=[method])
                for what, method in (("create", "POST"), ("copy", "POST"), ("push", "POST"), ("delete", "DELETE"))
            ),
            Route("/generate", Post(service, _GENERATE, generate), methods=["POST", "PUT"]),
            *(
                Route(path, Post(service, _TOKENIZE, tokenize, tasks=TASKS), methods=["POST"])
                for path in ("/tokenize", "/v1/tokenize")
            ),
            *(
                Route(path, Post(service, _DETOKENIZE, detokenize, tasks=TASKS), methods=["POST"])
                for path in ("/detokenize", "/v1/detokenize")
            ),
            *(Route(path, Get(service, health, public=True), methods=["GET"]) for path in ("/health", "/ping")),
            Route("/health_generate", Get(service, HealthGenerate(), public=True), methods=["GET"]),
            Route("/abort_request", Post(service, _ABORT, admin.abort_request, tasks=TASKS), methods=["POST"]),
            Route("/flush_cache", Get(service, admin.flush_cache, admin=True), methods=["GET", "POST"]),
            Route(
                "/start_profile",
                Post(service, _START_PROFILE, start_profile, default=b"{}", admin=True),
                methods=["POST"],
            ),
            Route(
                "/stop_profile",
                Post(service, _STOP_PROFILE, stop_profile, default=b"{}", admin=True),
                methods=["POST"],
            ),
            Route("/load", Get(service, admin.load), methods=["GET"]),
            *(Route(path, Get(service, admin.get_load), methods=["GET"]) for path in ("/v1/load", "/get_load")),
            *(
                Route(path, Get(service, handle), methods=["GET"])
                for handle, paths in (
                    (admin.get_model_info, ("/model_info", "/get_model_info")),
                    (admin.get_server_info, ("/server_info", "/get_server_info")),
                )
                for path in paths
            ),
            Route("/version", Get(service, admin.get_version), methods=["GET"]),
            Route("/tokenizer_info", Get(service, tokenizer_info), methods=["GET"]),
            Route("/metrics", Get(service, metrics, public=True), methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error},
        middleware=_cors(service),
    )
    app.router.redirect_slashes = False  # the connection has taken them off
    description = Get(service, Description(app.routes), public=True)
    app.router.routes.append(Route("/openapi.json", description, methods=["GET"]))
    return app


def _cors(service: Service) -> list[Middleware]:
    """Answers browsers that ask for pages of other servers, if any may ask."""
    origins = service.config.cors_origins
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=[each.rstrip("/").lower() for each in origins],
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Request-Id", "Retry-After", "Warning"],
            allow_private_network=True,
        )
    ]


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown route or method, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    scope = request.scope
    what = f"{request.method} {scope['path']}"
    messages = {
        404: f"Unknown request URL: {what}.{_meant(scope['path'], scope['app'])}",
        405: f"Method not allowed: {what}.",
    }
    if request.method == "OPTIONS" and "origin" in request.headers:
        messages[405] = (
            f"The page at '{request.headers['origin']}' may not ask: add its origin to ingress.cors_origins."
        )
    wire = wire_of(scope["path"].encode())
    body = wire.error(ApiError(error.status_code, messages.get(error.status_code, error.detail)))
    names = ("x-request-id", *(name.decode() for name in wire.identity_headers))
    headers = {**(error.headers or {}), **dict.fromkeys(names, request_id(scope))}
    return Response(body, error.status_code, headers, "application/json")


def _meant(path: str, app: Starlette) -> str:
    """The endpoint of a path that has a part too few or too many, as a wrong base URL makes it."""
    known = [each.path for each in app.routes if isinstance(each, Route) and len(each.path) > 1]
    near = [each for each in known if path.endswith(each) or (len(path) > 1 and each.endswith(path))]
    return f" Did you mean {max(near, key=len)}?" if near else ""
