"""POST /generate: SGLang's native endpoint.

Answers hold the whole text so far, also in streams: each event replaces the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct, structs

from llm_runtime.actors.ingress.constraints import constraint_of
from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.ledger import Entry
from llm_runtime.actors.ingress.openai.logprobs import finite
from llm_runtime.actors.ingress.sampling import (
    ExtraKey,
    LogitBias,
    MinP,
    Penalty,
    Priority,
    RepetitionPenalty,
    SeedField,
    TokenIds,
    TokenLimit,
    Tokens,
    TopK,
    TopP,
    limit_of,
    sampling_params,
    text_params,
)
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.ingress.thinking import CustomParams, thinking_budget, thinking_of
from llm_runtime.actors.messages import ChatPrompt, TextLogprob, TextPrompt
from llm_runtime.actors.parsers.reasoning import Markers, markers_after

DEFAULT_MAX_NEW_TOKENS = 128
"""SGLang's."""
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")
"""SGLang's names."""

_encode = msgspec.json.encode


class NativeSamplingParams(Struct, forbid_unknown_fields=True, kw_only=True):
    """SGLang's `sampling_params`."""

    unsupported: ClassVar[tuple[str, ...]] = ("stop_regex", "stream_interval", "beam_width")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"stream_interval": (1,)}

    max_new_tokens: TokenLimit | None = None
    min_new_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    sampling_seed: SeedField | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    # the form of the answer; see `constraints`
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    custom_params: CustomParams | None = None


class GenerateRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /generate. `return_logprob`, `top_logprobs_num` and `logprob_start_len` are for the whole batch.
    `model` is this server's own: SGLang serves one. `log_metrics` is without effect: every request is counted."""

    unsupported: ClassVar[tuple[str, ...]] = (
        *("audio_data", "custom_logit_processor", "image_data", "input_embeds", "lora_path", "modalities"),
        *("return_hidden_states", "session_params", "token_ids_logprob", "video_data", "bootstrap_host"),
    )

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    model: str | None = None
    sampling_params: NativeSamplingParams | None = None
    rid: ExtraKey | list[ExtraKey] | None = None
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Meta(ge=0, le=128)] = 0
    logprob_start_len: Annotated[int, Meta(ge=-1, lt=2**31)] = -1
    return_text_in_logprobs: bool = False
    priority: Priority | None = None
    extra_key: ExtraKey | None = None
    log_metrics: bool | None = None


class _Answer:
    """One choice's object, which grows."""

    def __init__(self, request: GenerateRequest, entry: Entry, identity: str, arrived_at: float) -> None:
        self._request = request
        self._entry = entry
        self._identity = identity
        self._arrived_at = arrived_at
        self._text = ""
        self._logprobs: list[TextLogprob] = []

    def document(self) -> dict[str, Any]:
        """Everything so far."""
        entry, request = self._entry, self._request
        text, _, logprobs = entry.take()
        self._text += text
        self._logprobs += logprobs
        meta: dict[str, Any] = {
            "id": self._identity,
            "finish_reason": _finish_reason(entry),
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": len(entry.output),
            "cached_tokens": entry.cached_tokens,
        }
        if request.return_logprob:
            prompt = (entry.prompt_logprobs or [])[max(0, request.logprob_start_len) :]
            for key, of_tokens in (("input", prompt), ("output", self._logprobs)):
                meta[f"{key}_token_logprobs"] = [self._token(each) for each in of_tokens]
                if request.top_logprobs_num:
                    meta[f"{key}_top_logprobs"] = [self._top(each) for each in of_tokens]
        if entry.finish is not None:
            meta["e2e_latency"] = time.monotonic() - self._arrived_at
        return {"text": self._text, "output_ids": entry.output.tolist(), "meta_info": meta}

    def _token(self, each: TextLogprob) -> tuple[float | None, int, str | None]:
        logprob = None if each.logprob is None else finite(each.logprob)
        return logprob, each.token, self._name(each.token_bytes)

    def _top(self, each: TextLogprob) -> list[tuple[float, int, str | None]] | None:
        if each.logprob is None:
            return None
        top = each.top[: self._request.top_logprobs_num]
        return [(finite(logprob), token, self._name(token_bytes)) for token, token_bytes, logprob in top]

    def _name(self, token_bytes: bytes) -> str | None:
        return token_bytes.decode(errors="replace") if self._request.return_text_in_logprobs else None


async def generate(service: Service, request: GenerateRequest, exchange: Exchange) -> None:
    """Answers with one object, or a list of them for a batch or n > 1."""
    service.check_model(request.model)
    params = request.sampling_params or NativeSamplingParams()
    if params.spaces_between_special_tokens is False:
        raise unsupported("spaces_between_special_tokens", "spaces_between_special_tokens = false")
    limit = limit_of(params.max_new_tokens)
    default = DEFAULT_MAX_NEW_TOKENS if params.max_new_tokens is None else None
    prompts, batch = _prompts(request)
    n = params.n or 1
    service.check_choices(len(prompts), n)
    drawn = exchange.work.identity
    identities = _identities(request.rid, drawn.rid, len(prompts), n)
    top = request.top_logprobs_num if request.return_logprob else -1
    sampling = sampling_params(
        service.model,
        seed=drawn.seed if params.sampling_seed is None else params.sampling_seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        max_tokens=limit,
        min_tokens=params.min_new_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias,
        logprobs=top,
        prompt_logprobs=top if request.logprob_start_len >= 0 else -1,
        constraint=constraint_of({name: getattr(params, name) for name in CONSTRAINTS}),
        limit_names=("min_new_tokens", "max_new_tokens"),
    )
    text = text_params(
        service.config, params.stop, params.skip_special_tokens, params.no_stop_trim, params.min_new_tokens
    )

    budget = None if params.custom_params is None else params.custom_params.thinking_budget
    budget = thinking_budget(service.model, {"custom_params": budget})
    markers = None if budget is None else await _markers(service, prompts)
    closing = [] if markers is None else [TextPrompt(markers.closing, add_special_tokens=False)]
    encoded = await service.tokenize(exchange, [*prompts, *closing])
    tokens = encoded[: len(prompts)]
    if markers is not None:
        sampling = structs.replace(sampling, thinking=thinking_of(markers, budget, encoded[-1]))
    where = "text" if request.text is not None else "input_ids"
    limits = [service.check_length(len(each) // 4, limit, default, where, "max_new_tokens") for each in tokens]
    with (
        service.generate(
            exchange.work,
            list(zip(tokens, limits, strict=True)),
            sampling,
            text,
            n=n,
            priority=request.priority or 0,
            extra_key=request.extra_key or "",
            eager=request.stream,
        ) as generation,
        service.known_as(zip(identities, generation.entries, strict=True)),
    ):
        single = not batch and n == 1
        answers = [
            _Answer(request, entry, identity, drawn.arrived_at)
            for entry, identity in zip(generation.entries, identities, strict=True)
        ]
        if not request.stream:
            await generation.progress()
            documents = [answer.document() for answer in answers]
            await exchange.answer(_encode(documents[0] if single else documents))
            return

        def events(entries: Sequence[Entry]) -> bytes:
            pieces: list[bytes] = []
            for entry in entries:
                document = answers[entry.index].document()
                if not single:
                    document["index"] = entry.index
                pieces.append(b"data: %s\n\n" % _encode(document))
            return b"".join(pieces)

        await generation.stream(exchange, events)
        await exchange.end()


def _prompts(request: GenerateRequest) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they are a batch."""
    text, ids = request.text, request.input_ids
    if (text is None) == (ids is None):
        raise invalid("Send either 'text' or 'input_ids'.", "text")
    if isinstance(text, str):
        return [TextPrompt(text)], False
    if not text and not ids:
        raise invalid("The list of prompts is empty.", "text" if ids is None else "input_ids")
    if text is not None:
        return [TextPrompt(each) for each in text], True
    assert ids is not None
    numbers = [each for each in ids if isinstance(each, int)]
    if len(numbers) == len(ids):
        return [numbers], False
    if numbers:
        raise invalid("'input_ids' must hold only token ids, or only lists of them.", "input_ids", "invalid_value")
    return [each for each in ids if isinstance(each, list)], True


async def _markers(service: Service, prompts: Sequence[Prompt]) -> Markers:
    """The texts around the reasoning of the outputs. Whether these begin inside it is seen in the prompts, that no
    template has made here. Raises ApiError where they differ in that."""
    name = service.model.reasoning_parser
    assert name is not None
    texts = [
        prompt.text if isinstance(prompt, TextPrompt) else (await service.detokenize(prompt)).text
        for prompt in prompts
        if not isinstance(prompt, ChatPrompt)
    ]
    first, *others = [markers_after(name, text) for text in texts]
    if any(other != first for other in others):
        raise invalid(
            "A thinking_budget needs prompts that all end inside the reasoning, or all outside: send the others apart.",
            "custom_params",
        )
    return first


def _identities(rid: str | list[str] | None, drawn: str, prompts: int, n: int) -> list[str]:
    """What `meta_info.id` says for each choice: the client's own ids if it has sent any."""
    if rid is None:
        return [drawn] if prompts * n == 1 else [f"{drawn}-{i}" for i in range(prompts * n)]
    names = [rid] if isinstance(rid, str) else rid
    if len(names) != prompts:
        raise invalid(f"There are {prompts} prompts but {len(names)} ids in 'rid'.", "rid", "invalid_value")
    return [name if n == 1 else f"{name}-{j}" for name in names for j in range(n)]


def _finish_reason(entry: Entry) -> dict[str, Any] | None:
    if entry.finish is None:
        return None
    if entry.finish == "length":
        return {"type": "length", "length": len(entry.output)}
    if entry.finish == "abort":
        return {"type": "abort", "message": "The request was aborted."}
    return {"type": entry.finish, "matched": entry.stop_reason}
