"""From scheduler to detokenizer, and from there to the ingress."""

from __future__ import annotations

from msgspec import Struct

from llm_runtime.actors.messages.base import AnyMessage, FinishReason, NonNegInt32, Rid, TokenId, Trace
from llm_runtime.actors.messages.requests import TextParams

# -- scheduler ↔ detokenizer ---------------------------------------------------------------------------------------


class TokenLogprob(Struct, array_like=True, frozen=True, gc=False):
    """Logprob of a token, and the most probable tokens at its place as (id, logprob)."""

    token: TokenId
    logprob: float | None
    top: list[tuple[TokenId, float]] = []


class OpenText(Struct, array_like=True, frozen=True, gc=False):
    """The detokenizer starts, or starts anew, with a request.

    Attributes:
        reply_to: the ingress that owns the request.
        base: output token ids (i32) that the ingress already has; their text is not sent again.
        characters: length of the text that the ingress already has.
    """

    rid: Rid
    attempt: NonNegInt32
    reply_to: str
    text: TextParams
    stop_token_ids: list[TokenId] = []
    base: bytes = b""
    characters: NonNegInt32 = 0
    trace: Trace = b""


class TokenEvent(Struct, array_like=True, frozen=True, gc=False):
    """New output tokens of one request; `index` counts its output tokens from 0."""

    rid: Rid
    attempt: NonNegInt32
    index: NonNegInt32
    tokens: list[TokenId]
    finish: FinishReason | None = None
    cached_tokens: NonNegInt32 = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Tokens(AnyMessage):
    """Scheduler → detokenizer, one message a step: requests that start, new tokens, requests to forget."""

    events: list[TokenEvent]
    opens: list[OpenText] = []
    closes: list[Rid] = []


class Stopped(AnyMessage):
    """Detokenizer → scheduler: a stop string has been completed by output token `index`; draw no more."""

    rid: Rid
    attempt: NonNegInt32
    index: NonNegInt32


# -- detokenizer → ingress -----------------------------------------------------------------------------------------


class TextLogprob(Struct, array_like=True, frozen=True, gc=False):
    """Logprob of a token with the bytes it stands for, and the most probable tokens at its place."""

    token: TokenId
    token_bytes: bytes
    logprob: float | None
    top: list[tuple[TokenId, bytes, float]] = []


class TextEvent(Struct, array_like=True, frozen=True, gc=False):
    """New text of one request.

    Attributes:
        index: of the first of `tokens` among the output tokens.
        offset: position of `text`'s first character in the whole output text.
        stop_reason: the stop string or stop token id that ended the request, if one did.
    """

    rid: Rid
    attempt: NonNegInt32
    index: NonNegInt32
    tokens: list[TokenId]
    offset: NonNegInt32
    text: str
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: NonNegInt32 = 0
    logprobs: list[TextLogprob] | None = None
    prompt_logprobs: list[TextLogprob] | None = None


class Texts(AnyMessage):
    """Detokenizer → ingress, one message a step for each ingress."""

    events: list[TextEvent]
