"""POST /v1/completions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import structs

from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.ingress.exchange import DONE, Exchange
from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.ledger import Entry
from llm_runtime.actors.ingress.openai.logprobs import CompletionLogprobs
from llm_runtime.actors.ingress.openai.protocol import (
    NEUTRAL,
    UNSUPPORTED,
    ChunkFrame,
    CompletionsRequest,
    TopLogprobsCount,
    usage,
)
from llm_runtime.actors.ingress.sampling import limit_of
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.messages import FillPrompt, TextPrompt

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_encode = msgspec.json.encode


class CompletionRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (
        *UNSUPPORTED,
        *("documents", "function_call", "functions", "reasoning_effort", "tool_choice", "tools", "verbosity"),
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "parallel_tool_calls": (True,),
        "tool_choice": ("none", "auto"),
    }

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    suffix: str | None = None
    echo: bool = False
    logprobs: TopLogprobsCount | None = None
    add_special_tokens: bool = True


class _Choice:
    """What one choice of the answer needs beside its entry: the echoed prompt, and where its text is."""

    def __init__(self, entry: Entry, echo: str | None, top: int, request: CompletionRequest) -> None:
        self.entry = entry
        self.top = top
        self._echo = echo
        self._logprobs = CompletionLogprobs(top, bool(request.return_tokens_as_token_ids))
        self._ids = bool(request.return_token_ids)
        self._begun = False

    def take(self) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
        """Text, logprobs and token ids that have arrived since the last call; first of all the prompt's text if it is
        echoed, and its ids if they are asked for."""
        text, tokens, logprobs = self.entry.take()
        ids: dict[str, Any] = {}
        if self._ids:
            ids = {} if self._begun else {"prompt_token_ids": self.entry.prompt_ids}
            ids["token_ids"] = tokens.tolist()
        self._begun = True
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            logprobs = [*(self.entry.prompt_logprobs or ()), *logprobs]
        return text, self._logprobs.next(logprobs) if self.top >= 0 else None, ids


async def completions(service: Service, request: CompletionRequest, exchange: Exchange) -> None:
    """Answers a completion request, as one document or as a stream of chunks."""
    request.check()
    model = service.check_model(request.model)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise unsupported("best_of", "best_of other than n")
    prompts = _prompts(request)
    service.check_choices(len(prompts), n)
    drawn = exchange.work.identity
    top = -1 if request.logprobs is None else request.logprobs
    limit = limit_of(request.max_tokens)
    default = DEFAULT_MAX_TOKENS if request.max_tokens is None else None
    sampling = request.sampling(service.model, drawn.seed, limit, top, top if request.echo else -1)
    text = request.text_params(service.config)

    whole, ends = await _tokenized(service, exchange, request, prompts)
    if ends and not request.ignore_eos:
        ids = dict.fromkeys([*sampling.stop_token_ids, *ends])
        sampling = structs.replace(sampling, stop_token_ids=list(ids))
    tokens = [request.cut(each, service.model.max_model_len) for each in whole]
    limits = [service.check_length(len(each) // 4, limit, default, "prompt", "max_tokens") for each in tokens]
    echoes: list[str | None] = [None] * len(prompts)
    if request.echo:
        shown = [
            prompt if len(cut) == len(each) else array("i", cut).tolist()
            for prompt, each, cut in zip(prompts, whole, tokens, strict=True)
        ]
        echoes = [await _text_of(service, each) for each in shown]

    eager = bool(request.stream)
    with (
        service.generate(
            exchange.work,
            list(zip(tokens, limits, strict=True)),
            sampling,
            text,
            n=n,
            priority=request.priority or 0,
            extra_key=request.prefix_key,
            eager=eager,
        ) as generation,
        service.known_as((name, entry) for name in request.names for entry in generation.entries),
    ):
        identity, created = f"cmpl-{drawn.rid}", drawn.created
        choices = [_Choice(entry, echoes[entry.index // n], top, request) for entry in generation.entries]
        if eager:
            frame = ChunkFrame("text_completion", identity, created, model, request.stream_options)
            await generation.stream(exchange, lambda entries: _events(entries, generation, frame, choices))
            await exchange.end(frame.last(generation) + DONE)
            return
        await generation.progress()
        document = {
            "id": identity,
            "object": "text_completion",
            "created": created,
            "model": model,
            "choices": [_document(choice) for choice in choices],
            "usage": usage(generation),
            "system_fingerprint": None,
        }
        await exchange.answer(_encode(document))


def _prompts(request: CompletionRequest) -> list[Prompt]:
    """The prompts of a request, which may be one or many, as text or as token ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [TextPrompt(prompt, request.add_special_tokens)]
    if not prompt:
        raise invalid("Invalid value for 'prompt': the list is empty.", "prompt", "invalid_value")
    texts = [each for each in prompt if isinstance(each, str)]
    ids = [each for each in prompt if isinstance(each, int)]
    lists = [each for each in prompt if isinstance(each, list)]
    if len(texts) == len(prompt):
        return [TextPrompt(each, request.add_special_tokens) for each in texts]
    if len(ids) == len(prompt):
        return [ids]
    if len(lists) == len(prompt):
        return [*lists]
    raise invalid(
        "Invalid value for 'prompt': a list must hold only strings, only token ids, or only lists of token ids.",
        "prompt",
        "invalid_value",
    )


async def _tokenized(
    service: Service, exchange: Exchange, request: CompletionRequest, prompts: list[Prompt]
) -> tuple[list[bytes], list[int]]:
    """Token ids (i32) of the prompts, and further ids that end an answer. Raises ApiError."""
    if not request.suffix:
        return await service.tokenize(exchange, prompts), []
    texts = [prompt.text for prompt in prompts if isinstance(prompt, TextPrompt)]
    if len(texts) < len(prompts):
        raise invalid("suffix needs prompts that are texts.", "prompt", "invalid_value")
    if request.echo and request.logprobs is not None:
        raise invalid("logprobs of an echoed prompt cannot be given where there is a suffix.", "echo")
    fills = [FillPrompt(text, request.suffix, request.add_special_tokens) for text in texts]
    encoded = await service.tokenize_pairs(exchange, fills)
    return [tokens for tokens, _ in encoded], array("i", encoded[0][1]).tolist()


async def _text_of(service: Service, prompt: Prompt) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    assert isinstance(prompt, list)
    return (await service.detokenize(prompt)).text


def _document(choice: _Choice) -> dict[str, Any]:
    text, logprobs, ids = choice.take()
    return {
        "index": choice.entry.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.entry.finish,
        "matched_stop": choice.entry.stop_reason,
        **ids,
    }


def _events(entries: Sequence[Entry], generation: Generation, frame: ChunkFrame, choices: Sequence[_Choice]) -> bytes:
    pieces: list[bytes] = []
    for entry in entries:
        text, logprobs, ids = choices[entry.index].take()
        if not text and entry.finish is None and not (logprobs and logprobs["tokens"]) and not ids:
            continue
        encoded = b"null" if logprobs is None else _encode(logprobs)
        content = b'"text":%b,"logprobs":%b,"finish_reason":' % (_encode(text), encoded)
        if entry.finish is None:
            content += b"null"
        else:
            content += b'"%b","matched_stop":%b' % (entry.finish.encode(), _encode(entry.stop_reason))
        if ids:
            content += b"," + _encode(ids)[1:-1]
        pieces.append(frame.chunk(entry.index, content, generation))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
