"""The requests of a chaos run: every way in which a client can ask, each with an answer that can be checked."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["completion", "chat", "native"]
PATHS: dict[Kind, str] = {"completion": "/v1/completions", "chat": "/v1/chat/completions", "native": "/generate"}

_SUBJECTS = ("A lighthouse keeper", "The old bridge", "My neighbour", "A young physicist", "The night train", "Our cat")
_DEEDS = (
    "finds a letter",
    "builds a clock",
    "crosses the river",
    "learns to sing",
    "forgets the way",
    "waits for rain",
)
_PLACES = (
    "in the mountains",
    "near the harbour",
    "under the stars",
    "at the market",
    "behind the school",
    "by the sea",
)


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        label: what is special about it, for reports.
        tokens: length of each choice's answer unless a stop string ends it.
        choices: answers that it asks for.
        shows_tokens: the answer names its tokens, and not only their text.
    """

    kind: Kind
    label: str
    body: dict[str, Any]
    tokens: int
    choices: int = 1
    shows_tokens: bool = False

    @property
    def path(self) -> str:
        return PATHS[self.kind]

    @property
    def streamed(self) -> bool:
        return bool(self.body["stream"])


def build_corpus(count: int, tokens: int, long_words: int, seed: int, show_tokens: bool) -> list[Request]:
    """`count` different requests: eight kinds, in turn.

    Args:
        tokens: length of each answer.
        long_words: words of a prompt that is prefilled in chunks.
        seed: of prompts and of the requests' own seeds.
        show_tokens: have every answer name its tokens: needed where texts cannot be compared with an undisturbed run.
    """
    draw = random.Random(seed)
    return [_build(index, tokens, long_words, draw, show_tokens) for index in range(count)]


def _build(index: int, tokens: int, long_words: int, draw: random.Random, show_tokens: bool) -> Request:
    prompt = f"{draw.choice(_SUBJECTS)} {draw.choice(_DEEDS)} {draw.choice(_PLACES)}. Story {index}:"
    greedy = {"temperature": 0}
    seeded = {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(2**31)}
    plain = {"logprobs": 0} if show_tokens else {}
    match index % 8:
        case 0:
            return _completion("greedy", prompt, tokens, greedy | plain)
        case 1:
            return _native("seeded", prompt, tokens, {"temperature": 0.8, "sampling_seed": seeded["seed"]})
        case 2:
            return _chat("greedy, logprobs", prompt, tokens, greedy | {"logprobs": True, "top_logprobs": 2})
        case 3:
            return _completion(
                "n=2, seeded, unstreamed", prompt, tokens, seeded | {"n": 2, "logprobs": 1}, stream=False
            )
        case 4:
            words = " ".join(draw.choice(_DEEDS) for _ in range(long_words // 3))
            return _completion("long prompt", f"{words}. {prompt}", tokens, greedy | plain)
        case 5:
            stop = {"stop": ["\n\nThe", " never ", "###"]}
            return _chat(
                "stop strings, seeded", prompt, tokens, seeded | stop | ({"logprobs": True} if show_tokens else {})
            )
        case 6:
            words = " ".join(draw.choice(_PLACES) for _ in range(long_words // 6))
            logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
            return _native("greedy, logprobs of a long prompt", f"{words}. {prompt}", tokens, greedy, logprobs)
        case _:
            penalties = {"n": 2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
            return _completion("n=2, penalties", prompt, tokens, seeded | penalties | plain)


def build_structured_corpus(count: int, seed: int) -> list[Request]:
    """`count` different requests whose answers a grammar keeps in form: JSON of a schema, and calls of tools, in turn.
    Each ends by itself."""
    draw = random.Random(seed)
    return [_build_structured(index, draw) for index in range(count)]


_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "kind": {"enum": ["fruit", "Gemüse", "魚"]},
        "grams": {"type": "integer", "minimum": 1, "maximum": 5000},
    },
    "required": ["name", "kind", "grams"],
    "additionalProperties": False,
}
_LIST = {"type": "array", "items": _ITEM, "minItems": 2, "maxItems": 3}
_SHOPPING = {"type": "object", "properties": {"items": _LIST}, "required": ["items"], "additionalProperties": False}
_TOOLS = [
    {"type": "function", "function": {"name": "buy", "parameters": _SHOPPING}},
    {"type": "function", "function": {"name": "weigh", "parameters": _ITEM}},
]
_LONGEST = 400


def _build_structured(index: int, draw: random.Random) -> Request:
    question = f"Shopping list {index}: {draw.choice(_SUBJECTS)} cooks {draw.choice(_PLACES)}."
    seeded = {"temperature": 1.0, "seed": draw.randrange(2**31), "ignore_eos": False}
    schema = {"type": "json_schema", "json_schema": {"name": "shopping", "schema": _SHOPPING, "strict": True}}
    match index % 4:
        case 0:
            return _chat("JSON schema", question, _LONGEST, seeded | {"response_format": schema})
        case 1:
            forced = {"tools": _TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
            return _chat("tool call", question, _LONGEST, seeded | forced)
        case 2:
            return _completion(
                "JSON schema, logprobs", question, _LONGEST, seeded | {"guided_json": _LIST, "logprobs": 1}
            )
        case _:
            named = {"tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": "buy"}}}
            return _chat("named tool, greedy", question, _LONGEST, seeded | named | {"temperature": 0})


def _completion(label: str, prompt: str, tokens: int, fields: dict[str, Any], stream: bool = True) -> Request:
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return Request("completion", f"completion, {label}", body, tokens, fields.get("n", 1), "logprobs" in fields)


def _chat(label: str, prompt: str, tokens: int, fields: dict[str, Any]) -> Request:
    messages = [{"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}
    body["stream_options"] = {"include_usage": True}
    return Request("chat", f"chat, {label}", body, tokens, 1, "logprobs" in fields)


def _native(
    label: str, prompt: str, tokens: int, sampling: dict[str, Any], fields: dict[str, Any] | None = None
) -> Request:
    params = {"max_new_tokens": tokens, "ignore_eos": True, **sampling}
    body = {"text": prompt, "sampling_params": params, "stream": True, **(fields or {})}
    return Request("native", f"native, {label}", body, tokens, 1, True)
