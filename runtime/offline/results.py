"""What a program gets for a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with its log probability, and those of the most probable tokens in its place, by id."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt and its answers; `cached_tokens` of the prompt needed no computation."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        finish_reason: "stop", "length", or what else ended it.
        stop_reason: the stop string or token id that did, if one did.
        logprobs: of each token, if they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True)
class Result:
    """The answers to one prompt, as many as `n` asked for; `text`, `token_ids` and `finish_reason` are the first one's.

    Attributes:
        prompt: as it was given: a text, token ids, or messages.
    """

    prompt: Any
    completions: list[Completion]
    usage: Usage

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason


def result(prompt: Any, answer: Any) -> Result:
    """From the document of POST /generate for one prompt."""
    documents: list[Any] = answer if isinstance(answer, list) else [answer]
    metas = [document["meta_info"] for document in documents]
    usage = Usage(
        prompt_tokens=metas[0]["prompt_tokens"],
        completion_tokens=sum(meta["completion_tokens"] for meta in metas),
        cached_tokens=metas[0]["cached_tokens"],
    )
    return Result(prompt, [_completion(document) for document in documents], usage)


def _completion(document: Any) -> Completion:
    meta = document["meta_info"]
    finish = meta["finish_reason"]
    return Completion(
        text=document["text"],
        token_ids=document["output_ids"],
        finish_reason=finish["type"],
        stop_reason=finish.get("matched"),
        logprobs=_logprobs(meta) if "output_token_logprobs" in meta else None,
    )


def _logprobs(meta: Any) -> list[TokenLogprob]:
    own = meta["output_token_logprobs"]
    tops = meta.get("output_top_logprobs") or [[]] * len(own)
    return [
        TokenLogprob(token, logprob, {other: value for value, other, _ in top or []})
        for (logprob, token, _), top in zip(own, tops, strict=True)
    ]
