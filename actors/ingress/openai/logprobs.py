"""Logprobs in the two formats of OpenAI's protocol."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from llm_runtime.actors.messages import TextLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return logprob if logprob > LOWEST else LOWEST


def chat_logprobs(logprobs: Iterable[TextLogprob], top: int, ids: bool = False) -> dict[str, Any]:
    """The `logprobs` of a chat choice, with the `top` most probable tokens beside each.

    Args:
        ids: tokens are written as `token_id:7`.
    """

    def told(token: int, token_bytes: bytes, logprob: float | None) -> dict[str, Any]:
        return _chat_token(token_name(token) if ids else token_bytes.decode(errors="replace"), token_bytes, logprob)

    return {
        "content": [
            {
                **told(each.token, each.token_bytes, each.logprob),
                "top_logprobs": [told(*other) for other in each.top[:top]],
            }
            for each in logprobs
        ],
        "refusal": None,
    }


def _chat_token(token: str, token_bytes: bytes, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": LOWEST if logprob is None else finite(logprob),
        "bytes": list(token_bytes),
    }


class CompletionLogprobs:
    """The `logprobs` of a completion choice: parallel lists, with each token's place in the text.

    Args:
        top: how many of the most probable tokens are reported, besides the drawn one.
        ids: tokens are written as `token_id:7`.
    """

    def __init__(self, top: int, ids: bool = False) -> None:
        self._top = top
        self._ids = ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, logprobs: Iterable[TextLogprob]) -> dict[str, Any]:
        """The lists for the tokens that follow those of the last call."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for each in logprobs:
            token = self._name(each.token, each.token_bytes)
            tokens.append(token)
            values.append(None if each.logprob is None else finite(each.logprob))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(each.token_bytes))
            if each.logprob is None:
                tops.append(None)
                continue
            top = {self._name(other, bytes_): finite(value) for other, bytes_, value in each.top[: self._top]}
            top.setdefault(token, finite(each.logprob))
            tops.append(top)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int, token_bytes: bytes) -> str:
        return token_name(token) if self._ids else token_text(token_bytes)


def token_name(token: int) -> str:
    """A token as its id, in vLLM's way."""
    return f"token_id:{token}"


def token_text(token_bytes: bytes) -> str:
    """A token as text; one that is a part of a character only is written as `bytes:\\xe2\\x82`, as OpenAI does."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
