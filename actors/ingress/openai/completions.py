"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from actors.ingress.errors import invalid, unsupported
from actors.ingress.exchange import DONE, Exchange
from actors.ingress.generation import Generation
from actors.ingress.ledger import Entry
from actors.ingress.openai.logprobs import CompletionLogprobs
from actors.ingress.openai.protocol import UNSUPPORTED, ChunkFrame, CompletionsRequest, TopLogprobsCount, usage
from actors.ingress.service import Prompt, Service
from actors.messages import TextPrompt

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_encode = msgspec.json.encode


class CompletionRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (*UNSUPPORTED, "reasoning_effort", "tools")

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool = False
    logprobs: TopLogprobsCount | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.tool_choice not in (None, "none"):
            raise unsupported("tool_choice")


class _Choice:
    """What one choice of the answer needs beside its entry: the echoed prompt, and where its text is."""

    def __init__(self, entry: Entry, echo: str | None, top: int) -> None:
        self.entry = entry
        self.top = top
        self._echo = echo
        self._logprobs = CompletionLogprobs(top)

    def take(self) -> tuple[str, dict[str, Any] | None]:
        """Text and logprobs that have arrived since the last call; first of all the prompt's if it is echoed."""
        text, _, logprobs = self.entry.take()
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            logprobs = [*(self.entry.prompt_logprobs or ()), *logprobs]
        return text, self._logprobs.next(logprobs) if self.top >= 0 else None


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
    sampling = request.sampling(service.model, drawn.seed, request.max_tokens, top, top if request.echo else -1)
    text = request.text_params(service.config)

    tokens = await service.tokenize(exchange, prompts)
    limits = [
        service.check_length(len(each) // 4, request.max_tokens, DEFAULT_MAX_TOKENS, "prompt", "max_tokens")
        for each in tokens
    ]
    echoes = [await _text_of(service, prompt) for prompt in prompts] if request.echo else [None] * len(prompts)

    eager = bool(request.stream)
    with service.generate(
        exchange.work,
        list(zip(tokens, limits, strict=True)),
        sampling,
        text,
        n=n,
        priority=request.priority or 0,
        extra_key=request.prefix_key,
        eager=eager,
    ) as generation:
        identity, created = f"cmpl-{drawn.rid}", drawn.created
        choices = [_Choice(entry, echoes[entry.index // n], top) for entry in generation.entries]
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


async def _text_of(service: Service, prompt: Prompt) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    assert isinstance(prompt, list)
    return (await service.detokenize(prompt)).text


def _document(choice: _Choice) -> dict[str, Any]:
    text, logprobs = choice.take()
    return {
        "index": choice.entry.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.entry.finish,
        "matched_stop": choice.entry.stop_reason,
    }


def _events(entries: Sequence[Entry], generation: Generation, frame: ChunkFrame, choices: Sequence[_Choice]) -> bytes:
    pieces: list[bytes] = []
    for entry in entries:
        text, logprobs = choices[entry.index].take()
        if not text and entry.finish is None and not (logprobs and logprobs["tokens"]):
            continue
        encoded = b"null" if logprobs is None else _encode(logprobs)
        content = b'"text":%b,"logprobs":%b,"finish_reason":' % (_encode(text), encoded)
        if entry.finish is None:
            content += b"null"
        else:
            content += b'"%b","matched_stop":%b' % (entry.finish.encode(), _encode(entry.stop_reason))
        pieces.append(frame.chunk(entry.index, content, generation))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
