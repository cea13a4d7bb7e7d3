"""What the tests of the parsers share: tools, how each format writes calls, and what a parser makes of a text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning, merged

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


def seed(calls: list[Call]) -> str:
    return qwen3_coder(calls).replace("tool_call>", "seed:tool_call>")


def dsml4(calls: list[Call]) -> str:
    return dsml(calls).replace("function_calls", "tool_calls")


def invoke(calls: list[Call], prefix: str = "") -> str:
    pair = f'<{prefix}parameter name="{{}}">{{}}</{prefix}parameter>\n'
    each = (
        f'<{prefix}invoke name="{n}">\n' + "".join(pair.format(k, bare(v)) for k, v in a.items()) + f"</{prefix}invoke>"
        for n, a in calls
    )
    return "\n".join(each)


def minimax(calls: list[Call]) -> str:
    return f"<minimax:tool_call>\n{invoke(calls)}\n</minimax:tool_call>"


def step3(calls: list[Call]) -> str:
    each = (
        f"<｜tool_call_begin｜>function<｜tool_sep｜>{invoke([call], 'steptml:')}<｜tool_call_end｜>" for call in calls
    )
    return "<｜tool_calls_begin｜>\n" + "\n".join(each) + "\n<｜tool_calls_end｜>"


def hunyuan(calls: list[Call]) -> str:
    pairs = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
    each = (f"<tool_call>{n}<tool_sep>\n" + "".join(pairs.format(k, bare(v)) for k, v in a.items()) for n, a in calls)
    return "<tool_calls>\n" + "\n".join(f"{body}</tool_call>" for body in each) + "\n</tool_calls>"


def listed(
    before: str, after: str = "", name: str = "name", arguments: str = "arguments"
) -> Callable[[list[Call]], str]:
    return lambda calls: before + js([{name: n, arguments: a} for n, a in calls]) + after


def internlm(calls: list[Call]) -> str:
    each = (js({"name": n, "parameters": a}) for n, a in calls)
    return "\n".join(f"<|action_start|> <|plugin|>\n{call}<|action_end|>" for call in each)


def granite_20b(calls: list[Call]) -> str:
    return "\n".join(f"<function_call> {js({'name': n, 'arguments': a})}" for n, a in calls)


def phi4(calls: list[Call]) -> str:
    return "functools" + js([{"name": n, "arguments": a} for n, a in calls])


def olmo3(calls: list[Call]) -> str:
    return "<function_calls>\n" + "\n".join(pythonic([call])[1:-1] for call in calls) + "\n</function_calls>"


def gemma3(calls: list[Call]) -> str:
    return "```tool_code\n" + "\n".join(pythonic([call])[1:-1] for call in calls) + "\n```"


def gemma4_value(value: Any) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{k}:{gemma4_value(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ",".join(map(gemma4_value, value)) + "]"
    return js(value)


def gemma4(calls: list[Call]) -> str:
    return "".join(f"<|tool_call>call:{n}{gemma4_value(a)}<tool_call|>" for n, a in calls)


def functiongemma(calls: list[Call]) -> str:
    each = (f"call:{n}{{" + ",".join(f"{k}:<escape>{bare(v)}<escape>" for k, v in a.items()) + "}" for n, a in calls)
    return "".join(f"<start_function_call>{call}<end_function_call>" for call in each)


def harmony(calls: list[Call]) -> str:
    each = (f"commentary to=functions.{n} <|constrain|>json<|message|>{js(a)}<|call|>" for n, a in calls)
    return "<|start|>assistant".join(f"<|channel|>{call}" for call in each)


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
    "deepseekv4": ("deepseekv32", dsml4),
    "seed_oss": ("seed_oss", seed),
    "minimax-m2": ("minimax-m2", minimax),
    "step3": ("step3", step3),
    "hunyuan": ("hunyuan", hunyuan),
    "hunyuan_a13b": ("hunyuan_a13b", listed("<tool_calls>", "</tool_calls>")),
    "jamba": ("jamba", listed("<tool_calls>", "</tool_calls>")),
    "nemotron_json": ("nemotron_json", listed("<TOOLCALL>", "</TOOLCALL>")),
    "granite": ("granite", listed("<|tool_call|>")),
    "granite-20b-fc": ("granite-20b-fc", granite_20b),
    "phi4_mini_json": ("phi4_mini_json", phi4),
    "xlam": ("xlam", listed("")),
    "xlam in Markdown": ("xlam", listed("```json\n", "\n```")),
    "interns1": ("interns1", internlm),
    "cohere_command4": ("cohere_command4", listed("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters")),
    "hermes list": ("qwen25", listed("<tool_call>", "</tool_call>")),
    "lfm2": ("lfm2", lambda calls: f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"),
    "olmo3": ("olmo3", olmo3),
    "gemma3": ("gemma3", gemma3),
    "gemma4": ("gemma4", gemma4),
    "functiongemma": ("functiongemma", functiongemma),
    "gpt-oss": ("gpt-oss", harmony),
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
