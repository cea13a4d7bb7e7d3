"""From the inputs of a request to sequences of tokens that fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.messages import PairPrompt, TextPrompt

MAX_INPUTS = 2048
"""OpenAI's."""
Truncate = Annotated[int, Meta(ge=-1, lt=2**31)]
"""vLLM's `truncate_prompt_tokens`: inputs are cut to so many tokens, with -1 to as many as the model takes."""


def limit_of(service: Service, truncate: int | None) -> int:
    """How many tokens inputs are cut to, 0 for none. Raises ApiError for more than the model takes."""
    longest = service.model.max_model_len
    if truncate is None or truncate == 0:
        return 0
    if truncate > longest:
        raise invalid(
            f"truncate_prompt_tokens is {truncate}, and the model takes at most {longest} tokens.",
            "truncate_prompt_tokens",
            "invalid_value",
        )
    return longest if truncate == -1 else truncate


async def vectors_of_texts(
    service: Service, exchange: Exchange, prompts: Sequence[Prompt], param: str, truncate: int | None
) -> tuple[list[bytes], int]:
    """The vector (f32) of each prompt, and how many tokens they have together.

    Args:
        param: the request's field that holds them.

    Raises ApiError for what is no input, or too long.
    """
    _check_count(len(prompts), param)
    limit = limit_of(service, truncate)
    tokens = await service.tokenize(exchange, [_cut(prompt, limit) for prompt in prompts])
    return await _vectors(service, exchange, [(each, b"") for each in tokens], param)


async def vectors_of_pairs(
    service: Service, exchange: Exchange, pairs: Sequence[tuple[str, str]], param: str, truncate: int | None
) -> tuple[list[bytes], int]:
    """The vector of each pair of texts; as `vectors_of_texts`."""
    _check_count(len(pairs), param)
    limit = limit_of(service, truncate)
    encoded = await service.tokenize_pairs(exchange, [PairPrompt(text, pair, limit) for text, pair in pairs])
    sequences = [(tokens, types if any(types) else b"") for tokens, types in encoded]
    return await _vectors(service, exchange, sequences, param)


async def _vectors(
    service: Service, exchange: Exchange, sequences: Sequence[tuple[bytes, bytes]], param: str
) -> tuple[list[bytes], int]:
    limit = service.model.max_model_len
    for tokens, _ in sequences:
        count = len(tokens) // 4
        if not count:
            raise invalid(f"'{param}' has an empty input: it must have at least one token.", param, "invalid_value")
        if count > limit:
            raise invalid(
                f"This model's maximum context length is {limit} tokens. However, your request has {count} tokens in "
                "an input. Shorten it, or send truncate_prompt_tokens.",
                param,
                "context_length_exceeded",
            )
    vectors = await service.encoders.vectors(exchange.work, sequences)
    return vectors, sum(len(tokens) for tokens, _ in sequences) // 4


def _check_count(count: int, param: str) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise invalid(f"'{param}' has {count} inputs: send 1 to {MAX_INPUTS}.", param, "invalid_value")


def _cut(prompt: Prompt, limit: int) -> Prompt:
    if not limit:
        return prompt
    if isinstance(prompt, list):
        return prompt[:limit]
    assert isinstance(prompt, TextPrompt)
    return TextPrompt(prompt.text, prompt.add_special_tokens, limit)
