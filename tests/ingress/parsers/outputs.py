"""What the tests of the parsers share: tools, how each format writes calls, and what a parser makes of a text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from actors.ingress.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning, merged

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "place": {"type": "object"},
            "hours": {"type": "array"},
            "limit": {"type": ["number", "null"]},
        },
    },
    "write-file": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
    "anything": None,
}
Call = tuple[str, dict[str, Any]]


def js(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{js({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


def llama(calls: list[Call]) -> str:
    return "<|python_tag|>" + "; ".join(js({"name": n, "parameters": a}) for n, a in calls)


def mistral_list(calls: list[Call]) -> str:
    return "[TOOL_CALLS] " + js([{"name": n, "arguments": a} for n, a in calls])


def mistral(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{js(a)}" for n, a in calls)


def deepseekv3(calls: list[Call]) -> str:
    each = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{js(a)}\n```<｜tool▁call▁end｜>" for n, a in calls
    )
    return "<｜tool▁calls▁begin｜>" + "\n".join(each) + "<｜tool▁calls▁end｜>"


def deepseekv31(calls: list[Call]) -> str:
    each = (f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{js(a)}<｜tool▁call▁end｜>" for n, a in calls)
    return "<｜tool▁calls▁begin｜>" + "".join(each) + "<｜tool▁calls▁end｜>"


def kimi(calls: list[Call]) -> str:
    each = (
        f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{js(a)}<|tool_call_end|>"
        for i, (n, a) in enumerate(calls)
    )
    return "<|tool_calls_section_begin|>" + "".join(each) + "<|tool_calls_section_end|>"


def bare(value: Any) -> str:
    """A value as the formats write it that put no quotes around strings."""
    return value if isinstance(value, str) else js(value)


def glm45(calls: list[Call]) -> str:
    pairs = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
    each = (n + "\n" + "".join(pairs.format(k, bare(v)) for k, v in a.items()) for n, a in calls)
    return "\n".join(f"<tool_call>{body}</tool_call>" for body in each)


def glm47(calls: list[Call]) -> str:
    return glm45(calls).replace("\n<arg", "<arg").replace(">\n</tool", "></tool").replace("now\n<", "now<")


def qwen3_coder(calls: list[Call]) -> str:
    pairs = "<parameter={}>\n{}\n</parameter>\n"
    each = (f"<function={n}>\n" + "".join(pairs.format(k, bare(v)) for k, v in a.items()) for n, a in calls)
    return "\n".join(f"<tool_call>\n{body}</function>\n</tool_call>" for body in each)


def dsml(calls: list[Call]) -> str:
    def parameter(key: str, value: Any) -> str:
        string = "true" if isinstance(value, str) else "false"
        return f'<｜DSML｜parameter name="{key}" string="{string}">{bare(value)}</｜DSML｜parameter>\n'

    each = (
        f'<｜DSML｜invoke name="{n}">\n' + "".join(parameter(k, v) for k, v in a.items()) + "</｜DSML｜invoke>\n"
        for n, a in calls
    )
    return "<｜DSML｜function_calls>\n" + "".join(each) + "</｜DSML｜function_calls>"


def dsml_json(calls: list[Call]) -> str:
    each = (f'<invoke name="{n}">\n{js(a)}\n</invoke>\n' for n, a in calls)
    return "<function_calls>\n" + "".join(each) + "</function_calls>"


def pythonic(calls: list[Call]) -> str:
    each = (f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls)
    return "[" + ", ".join(each) + "]"


WRITERS: dict[str, tuple[str, Callable[[list[Call]], str]]] = {
    "hermes": ("hermes", hermes),
    "qwen25": ("qwen25", hermes),
    "llama3": ("llama3", llama),
    "mistral": ("mistral", mistral),
    "mistral list": ("mistral", mistral_list),
    "deepseekv3": ("deepseekv3", deepseekv3),
    "deepseekv31": ("deepseekv31", deepseekv31),
    "deepseekv32": ("deepseekv32", dsml),
    "deepseekv32 json": ("deepseekv32", dsml_json),
    "kimi_k2": ("kimi_k2", kimi),
    "glm45": ("glm45", glm45),
    "glm47": ("glm47", glm47),
    "qwen3_coder": ("qwen3_coder", qwen3_coder),
    "pythonic": ("pythonic", pythonic),
}
"""Formats, the name of each, and how models write a list of calls in it."""


def events_of(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return merged(events + parser.finish())


def splits(text: str, seed: int = 0) -> Iterable[list[str]]:
    """A text in one piece, in characters, and in pieces of random lengths."""
    yield [text]
    yield list(text)
    chance = random.Random(f"{seed}{text}")
    for _ in range(3):
        places = sorted(chance.randrange(len(text) + 1) for _ in range(min(len(text), chance.randrange(1, 12))))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def parsed(make: Callable[[], Parser], text: str) -> list[Event]:
    """What a parser makes of a text, however it is split."""
    whole: list[Event] | None = None
    for pieces in splits(text):
        events = events_of(make(), pieces)
        assert whole is None or events == whole, pieces
        whole = events
    assert whole is not None
    return whole


def plain(events: list[Event]) -> list[Any]:
    """Events in short: content as a string, a call as name and the text of its arguments, reasoning in a set."""
    short: list[Any] = []
    for event in events:
        match event:
            case Content(text):
                short.append(text)
            case Reasoning(text):
                short.append({text})
            case CallStart(index, name):
                assert index == sum(isinstance(each, tuple) for each in short)
                short.append((name, ""))
            case CallArguments(index, text):
                assert index == sum(isinstance(each, tuple) for each in short) - 1
                short[-1] = (short[-1][0], short[-1][1] + text)
    return short
