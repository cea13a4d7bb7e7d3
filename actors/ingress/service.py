"""What all endpoints share: who may ask, how prompts become tokens, how much may be generated, what is in progress."""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import NamedTuple

from llm_runtime.actors.checkpoint.pooling import Task
from llm_runtime.actors.ingress.access import Access
from llm_runtime.actors.ingress.config import IngressConfig, ServedModel
from llm_runtime.actors.ingress.control import Control
from llm_runtime.actors.ingress.encoders import Encoders
from llm_runtime.actors.ingress.errors import ApiError, invalid
from llm_runtime.actors.ingress.exchange import SHUTTING_DOWN, ClientGone, Exchange
from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.history import History
from llm_runtime.actors.ingress.ledger import Entry, Ledger
from llm_runtime.actors.ingress.metrics import ActorFigures, IngressMetrics
from llm_runtime.actors.ingress.openai.responses.store import ResponseStore
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.ingress.recent import RecentRequests
from llm_runtime.actors.ingress.sampling import check_size
from llm_runtime.actors.ingress.tokenization import Tokenization
from llm_runtime.actors.ingress.tracing import Tracing
from llm_runtime.actors.ingress.work import Work
from llm_runtime.actors.messages import (
    ChatPrompt,
    Detokenize,
    Detokenized,
    EngineInfo,
    FillPrompt,
    PairPrompt,
    SamplingParams,
    TextParams,
    TextPrompt,
    Tokenize,
)

MAX_CHOICES = 1024
"""Prompts × answers to each of one HTTP request."""

ENGINES_TIMEOUT_S = 10.0
ENGINES_LOOK_S = 0.05
"""How often to look whether engines have registered."""

_WHAT_IT_DOES = {
    "generate": 'generates text. To embed with it, serve it with task = "embed" under [model].',
    "embed": "is an embedding model: use /v1/embeddings, /v1/rerank or /v1/score.",
    "classify": "is a classifier: use /v1/classify, or, if it has one class, /v1/rerank or /v1/score.",
}

ANY_TASK: tuple[Task, ...] = ("generate", "embed", "classify")
LATEST = ":latest"
"""Ollama's tag of a model's newest version, which its clients add to names."""

Prompt = ChatPrompt | TextPrompt | list[int]


class Served(NamedTuple):
    """A model with those that are asked for it."""

    model: ServedModel
    tokenization: Tokenization
    encoders: Encoders


class Service:
    """What endpoints work with: all that the requests of this worker share, and the model that one of them is about.

    Attributes:
        models: what is served.
        model: the one that the request is about; the first one where `about` was not asked.
        tokenization: of its prompts.
        metrics: what this worker counts; `figures` gives all of its figures.
        control: what other actors are asked to do beside generating.
        tracing: None if nothing is traced.
        recent: None if no requests are kept for the case of a crash.
        encoders: what it is asked that embeds or classifies.
        actors: the figures of the others.
        history: those figures, over the last minutes.
        responses: those that are kept for later requests.
        created: when this worker was started, seconds since 1970.
        in_progress: admitted HTTP requests.
        draining: new requests are refused, since this worker is about to stop.
        access: who may ask for what.
    """

    def __init__(
        self,
        config: IngressConfig,
        name: str,
        ledger: Ledger,
        models: Sequence[Served],
        metrics: IngressMetrics,
        actors: ActorFigures,
        figures: Callable[[], dict[str, float]],
        control: Control,
        tracing: Tracing | None = None,
        recent: RecentRequests | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.ledger = ledger
        self.models = [each.model for each in models]
        self.model, self.tokenization, self.encoders = models[0]
        self.metrics = metrics
        self.actors = actors
        self.figures = figures
        self.control = control
        self.tracing = tracing
        self.recent = recent
        self.history = History()
        self.responses = ResponseStore(Path(config.response_dir), config.response_store_bytes)
        self.created = int(time.time())
        self.in_progress: set[Exchange] = set()
        self._served = list(models)
        self._by_name = {name: each for each in models for name in each.model.served_model_names}
        self._names: dict[str, list[Entry]] = {}
        self.draining = False
        self.access = Access(config.api_key, config.admin_api_key, config.cors_origins, config.allowed_hosts)

    # -- who may ask ----------------------------------------------------------------------------------------------

    def check_open(self, exchange: Exchange) -> None:
        """Raises ApiError when this worker is about to stop and the request is a new one."""
        if self.draining and not exchange.work.is_continued:
            raise ApiError(
                503,
                "The server is shutting down: it is draining and takes no new requests.",
                code=SHUTTING_DOWN,
                retry_after_s=1.0,
            )

    def check_priority(self, exchange: Exchange, priority: int | None) -> None:
        """Raises ApiError when the client may not say how urgent its request is, and says so."""
        if not priority or self.config.priority == "anyone":
            return
        if self.config.priority == "admin" and self.config.admin_api_key is not None:
            self.access.check(exchange, admin=True)
            return
        raise invalid(
            "priority is not allowed on this server (ingress.priority): leave it out.",
            "priority",
            "unsupported_parameter",
        )

    @contextmanager
    def admitted(self, exchange: Exchange) -> Iterator[None]:
        """Counts the request as in progress, and interrupts it when its client goes or its time is up.

        Raises ApiError when this worker has too many. The request's body must have been read.
        """
        if len(self.in_progress) >= self.config.max_concurrent:
            raise ApiError(503, "The server has too many requests in progress.", code="overloaded", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        timeout_s = self.config.request_timeout_s
        left_s = timeout_s - (time.monotonic() - exchange.work.identity.arrived_at)
        too_late = ApiError(408, f"The request took longer than {timeout_s:g} seconds.", code="timeout")
        timer = loop.call_later(left_s, exchange.interrupt, too_late)
        watcher = loop.create_task(_watch_connection(exchange))
        self.in_progress.add(exchange)
        try:
            yield
        finally:
            self.in_progress.discard(exchange)
            watcher.cancel()
            timer.cancel()

    def about(self, name: str | None, tasks: Sequence[Task] = ANY_TASK) -> Service:
        """This service for a request that asks for a model by its name: the same in everything but the model.

        One that names no model is about the first that is for one of the tasks, and so is one that names an unknown
        model: `check_model` tells its client.
        """
        served = self._by_name.get(name or "") or self._by_name.get((name or "").removesuffix(LATEST))
        if served is None:
            served = next((each for each in self._served if each.model.task in tasks), self._served[0])
        if served.model is self.model:
            return self
        other = copy(self)
        other.model, other.tokenization, other.encoders = served
        return other

    def check_model(self, model: str | None) -> str:
        """The name to answer with. Raises ApiError for a model that is not served here, or not the one that the
        request is about."""
        if model is None or model in self.model.served_model_names:
            return model or self.model.name
        names = self._by_name
        raise ApiError(
            404, f"The model '{model}' does not exist. Served here: {', '.join(names)}.", "model", "model_not_found"
        )

    def model_of_actor(self, actor: str) -> str:
        """Name of the model for which an actor works; names of all of them if it works for all."""
        if len(self.models) > 1:
            engine = actor.partition(".")[0]
            of_engine = {info.engine: info.model for info in self.ledger.engines.infos}.get(engine)
            for model in self.models:
                owners = (actor, f"{engine}.tokenizer") if actor.endswith(".detokenizer") else (actor,)
                if model.tokenizer in owners or actor in model.encoders or model.model == of_engine:
                    return model.name
        return ",".join(model.name for model in self.models)

    def check_task(self, tasks: Sequence[Task]) -> None:
        """Raises ApiError unless the model is for one of these tasks."""
        task = self.model.task
        if task not in tasks:
            raise invalid(f"The model '{self.model.name}' {_WHAT_IT_DOES[task]}", "model", "unsupported_model")

    async def known_engines(self) -> list[EngineInfo]:
        """All engines. Just after a start they register within a second or two: waits until each model that generates
        has those it needs. Raises ApiError when there is none in time."""
        engines = self.ledger.engines
        deadline = time.monotonic() + ENGINES_TIMEOUT_S
        while not all(engines.complete(each.model) for each in self.models if each.task == "generate"):
            if time.monotonic() > deadline:
                if engines.infos:
                    break
                raise ApiError(503, f"No engine has registered within {ENGINES_TIMEOUT_S:g} s.", retry_after_s=1.0)
            await asyncio.sleep(ENGINES_LOOK_S)
        return engines.infos

    # -- prompts --------------------------------------------------------------------------------------------------

    async def tokenize(self, exchange: Exchange, prompts: Sequence[Prompt]) -> list[bytes]:
        """Token ids (i32) of a request's prompts. Raises ApiError for one that cannot be encoded or is no prompt."""
        if exchange.work.prompts is not None:
            return exchange.work.prompts
        answers = await asyncio.gather(
            *(self._tokenize(prompt, exchange.work.trace) for prompt in prompts), return_exceptions=True
        )
        tokens: list[bytes] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            tokens.append(answer)
        exchange.work.prompts = tokens
        return tokens

    async def length_of(self, prompt: Prompt) -> int:
        """The tokens of a prompt. Raises ApiError for one that cannot be encoded."""
        return len(await self._tokenize(prompt, b"")) // 4

    async def detokenize(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> Detokenized:
        """The text of token ids. Raises ApiError for ids that the model does not have."""
        self.check_token_ids(tokens, "tokens")
        return await self.tokenization.text(Detokenize(new_rid(), array("i", tokens).tobytes(), skip_special_tokens))

    def check_token_ids(self, tokens: Sequence[int], param: str) -> None:
        """Raises ApiError for token ids that the model does not have."""
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.model.vocab_size):
            limit = self.model.vocab_size
            raise invalid(f"Invalid value for '{param}': token ids must be 0 to {limit - 1}.", param, "invalid_value")

    def check_length(
        self, prompt_tokens: int, max_tokens: int | None, default: int | None, prompt_param: str, limit_param: str
    ) -> int:
        """How many tokens an answer may have: what the client asks for, or else the default, or else all that fit.

        Raises ApiError when the prompt does not fit the context, or does not with what is asked for explicitly, as
        vLLM and SGLang do. The last two arguments name the request's fields.
        """
        limit = self.model.max_model_len
        if prompt_tokens == 0:
            raise invalid("The prompt is empty: it must have at least one token.", prompt_param)
        if max_tokens is None:
            if prompt_tokens < limit:
                return limit - prompt_tokens if default is None else min(default, limit - prompt_tokens)
            max_tokens = 1
        if prompt_tokens + max_tokens > limit:
            raise invalid(
                f"This model's maximum context length is {limit} tokens. However, your request has {prompt_tokens} "
                f"tokens in the prompt and {limit_param} is {max_tokens}. Shorten the prompt or lower {limit_param}.",
                prompt_param,
                "context_length_exceeded",
            )
        return max_tokens

    async def tokenize_pairs(
        self, exchange: Exchange, pairs: Sequence[PairPrompt | FillPrompt]
    ) -> list[tuple[bytes, bytes]]:
        """Token ids (i32) of pairs of texts, and what `Tokenized` tells more. Raises ApiError as `tokenize`."""
        known = exchange.work.prompts
        if known is not None:
            return list(zip(known[::2], known[1::2], strict=True))
        questions = (self.tokenization.pair(Tokenize(new_rid(), pair)) for pair in pairs)
        answers = await asyncio.gather(*questions, return_exceptions=True)
        encoded: list[tuple[bytes, bytes]] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            encoded.append(answer)
        exchange.work.prompts = [part for each in encoded for part in each]
        return encoded

    # -- generations ----------------------------------------------------------------------------------------------

    def generate(
        self,
        work: Work,
        prompts: Sequence[tuple[bytes, int]],
        sampling: SamplingParams,
        text: TextParams,
        *,
        n: int = 1,
        priority: int = 0,
        extra_key: str = "",
        eager: bool = False,
    ) -> Generation:
        """The engine requests of an HTTP request, which go out when the `with` block of the result is entered. Raises
        ApiError when they are too large together."""
        check_size([len(prompt) for prompt, _ in prompts], n, sampling, text)
        return Generation(
            self.ledger,
            work,
            prompts,
            sampling,
            text,
            timeout_s=self.config.request_timeout_s,
            n=n,
            priority=priority,
            extra_key=extra_key,
            eager=eager,
            cache_report=self.config.cache_report,
            model=self.model.model,
        )

    def check_choices(self, prompts: int, n: int) -> None:
        """Raises ApiError when one HTTP request asks for too many answers."""
        if n > self.config.max_n:
            raise invalid(f"Invalid value for 'n': it must be at most {self.config.max_n}.", "n", "invalid_value")
        if prompts * n > MAX_CHOICES:
            raise invalid(
                f"The prompts ask for {prompts * n} answers together; at most {MAX_CHOICES} are allowed.", "n"
            )

    @contextmanager
    def known_as(self, names: Iterable[tuple[str, Entry]]) -> Iterator[None]:
        """For as long as it lasts, `end` finds choices by the client's own names for them."""
        pairs = list(names)
        for name, entry in pairs:
            self._names.setdefault(name, []).append(entry)
        try:
            yield
        finally:
            for name, entry in pairs:
                self._names[name].remove(entry)
                if not self._names[name]:
                    del self._names[name]

    def end(self, name: str) -> None:
        """Ends requests early by the identity of their answer, or a name that the client has given; all of them if it
        is empty."""
        named = self._names.get(name, ())
        for entry in list(self.ledger.live.values()):
            rid = entry.rid.partition("/")[0]
            if not name or entry in named or re.split("[-_]", name, maxsplit=1)[-1] == rid:
                self.ledger.end(entry)

    async def _tokenize(self, prompt: Prompt, trace: bytes) -> bytes:
        if isinstance(prompt, list):
            self.check_token_ids(prompt, "prompt")
            return array("i", prompt).tobytes()
        return await self.tokenization.tokens(Tokenize(new_rid(), prompt, trace))


async def _watch_connection(exchange: Exchange) -> None:
    await exchange.disconnected()
    exchange.interrupt(ClientGone())
