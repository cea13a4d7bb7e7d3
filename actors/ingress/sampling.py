"""Sampling and text parameters of requests: limits, and what clients' fields mean for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from msgspec import Meta

from llm_runtime.actors.ingress.config import IngressConfig, ServedModel
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.messages import Constraint, SamplingParams, TextParams

TopP = Annotated[float, Meta(ge=0, le=1)]
"""0 leaves the most probable token, as with OpenAI."""
MinP = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, lt=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=2)]
Tokens = Annotated[int, Meta(ge=0, lt=2**31)]
TokenLimit = Annotated[int, Meta(ge=-1, lt=2**31)]
"""Of an answer; -1 is none."""
SeedField = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
ExtraKey = Annotated[str, Meta(max_length=1024)]
TokenIds = Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(max_length=1024)]
LogitBias = Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
"""As many as vLLM's GPU workers take; OpenAI names no number."""

Number = TypeVar("Number", int, float)

MAX_STOP_LENGTH = 1024
MAX_REQUEST_BYTES = 64 * 2**20
"""Of what engines are told of all answers to one HTTP request: each is told everything, and keeps it."""
_BIAS_BYTES = 512
"""A bias weighs so much: engines work on each of them at every token."""
MIN_TEMPERATURE = 1e-4
"""A lower temperature draws the most probable token, as 0 does: it would make logits overflow."""


def limit_of(tokens: int | None) -> int | None:
    """How many tokens an answer may have; None for no limit, which llama.cpp's clients write as -1."""
    return None if tokens == -1 else tokens


def sampling_params(
    model: ServedModel,
    *,
    seed: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    frequency_penalty: float | None,
    presence_penalty: float | None,
    repetition_penalty: float | None,
    max_tokens: int | None,
    min_tokens: int | None,
    stop_token_ids: Sequence[int] | None,
    ignore_eos: bool | None,
    logit_bias: dict[int, float] | None,
    logprobs: int = -1,
    prompt_logprobs: int = -1,
    constraint: Constraint | None = None,
    limit_names: tuple[str, str] = ("min_tokens", "max_tokens"),
) -> SamplingParams:
    """What the engine is told; None stands for a parameter that the client has not given: the model's default is taken.

    A request without a seed has one drawn for it, so that a token drawn again is the same token. `max_tokens` is set
    later, when the prompt's length is known; `limit_names` are the client's names of the two limits. Raises ApiError
    for values that contradict each other or the model.
    """
    at_least, at_most = limit_names
    for param, ids in (("stop_token_ids", stop_token_ids or ()), ("logit_bias", logit_bias or ())):
        for token in ids:
            if not 0 <= token < model.vocab_size:
                raise invalid(
                    f"Invalid value for '{param}': token ids must be 0 to {model.vocab_size - 1}.",
                    param,
                    "invalid_value",
                )
    if min_tokens and max_tokens is not None and min_tokens > max_tokens:
        raise invalid(f"{at_least} ({min_tokens}) is larger than {at_most} ({max_tokens}).", at_least)
    if min_tokens and min_tokens > model.max_model_len:
        raise invalid(
            f"{at_least} ({min_tokens}) is larger than the context length of {model.max_model_len} tokens.",
            at_least,
            "context_length_exceeded",
        )
    default = model.sampling
    temperature = _first(temperature, default.temperature, 1.0)
    top_p = _first(top_p, default.top_p, 1.0)
    if top_p == 0:
        top_p, top_k = 1.0, 1
    return SamplingParams(
        max_tokens=0,
        seed=seed & (2**63 - 1),
        temperature=0.0 if temperature < MIN_TEMPERATURE else temperature,
        top_p=top_p,
        top_k=max(0, _first(top_k, default.top_k, 0)),
        min_p=_first(min_p, default.min_p, 0.0),
        frequency_penalty=frequency_penalty or 0.0,
        presence_penalty=presence_penalty or 0.0,
        repetition_penalty=_first(repetition_penalty, default.repetition_penalty, 1.0),
        min_tokens=min_tokens or 0,
        stop_token_ids=list(dict.fromkeys([*(() if ignore_eos else model.eos_token_ids), *(stop_token_ids or ())])),
        logit_bias=logit_bias or {},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
        max_repeats=0 if ignore_eos else default.max_repeats or 0,
    )


def check_size(prompts: Sequence[int], n: int, sampling: SamplingParams, text: TextParams) -> None:
    """Raises ApiError when the answers to one HTTP request ask too much of engines together.

    Args:
        prompts: length of each prompt in bytes.
        n: answers to each.
    """
    constraint = 0 if sampling.constraint is None else len(sampling.constraint.text)
    each = constraint + sum(map(len, text.stop)) + 4 * len(sampling.stop_token_ids)
    each += _BIAS_BYTES * len(sampling.logit_bias)
    if n * (sum(prompts) + each * len(prompts)) > MAX_REQUEST_BYTES:
        raise invalid(
            f"The request asks for {n * len(prompts)} answers, each with its prompt, logit_bias, stop strings and "
            "constraint, and that is too much for one request: lower n, or send several requests.",
            "n",
        )


def _first(given: Number | None, default: Number | None, neutral: Number) -> Number:
    """What the client says, or else the model's default, or else what the API has."""
    if given is not None:
        return given
    return neutral if default is None else default


def text_params(
    config: IngressConfig,
    stop: str | list[str] | None,
    skip_special_tokens: bool | None,
    no_stop_trim: bool | None,
    min_tokens: int | None,
) -> TextParams:
    """How tokens become text. Raises ApiError for bad stop strings."""
    strings = [stop] if stop and isinstance(stop, str) else list(stop or ())
    if len(strings) > config.max_stop_strings:
        raise invalid(
            f"Invalid value for 'stop': at most {config.max_stop_strings} stop strings are allowed.",
            "stop",
            "invalid_value",
        )
    for string in strings:
        if not 0 < len(string) <= MAX_STOP_LENGTH:
            raise invalid(
                f"Invalid value for 'stop': a stop string has 1 to {MAX_STOP_LENGTH} characters.",
                "stop",
                "invalid_value",
            )
    return TextParams(strings, skip_special_tokens is not False, bool(no_stop_trim), min_tokens or 0)
