"""Tool calls in every format: what they are written as, what is wrong with them, and in which pieces they come."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from llm_runtime.actors.parsers.events import CallArguments, CallStart, Parser
from llm_runtime.actors.parsers.tool_calls import TOOL_CALL_FORMATS, tool_call_format, tool_call_parser
from llm_runtime.actors.parsers.tool_calls.json_list import JSONListCalls

from .outputs import TOOLS, WRITERS, Call, js, parsed, plain

PARIS: Call = ("get_weather", {"city": "Paris"})
PYTHON = ("pythonic", "lfm2", "olmo3", "gemma3")
SCENARIOS: dict[str, list[str | list[Call]]] = {
    "one": [[PARIS]],
    "several": [[PARIS, ("get_weather", {"city": "London", "days": 3}), ("now", {})]],
    "the same twice": [[PARIS, PARIS]],
    "text before": ["Let me look.", [PARIS]],
    "text around": ["I look.", [PARIS], "That was it."],
    "calls apart": ["One.", [PARIS], "Two.", [("now", {})]],
    "no arguments": [[("now", {})]],
    "unicode": ["Ich schaue für dich 🙂", [("get_weather", {"city": "Zürich 東京 🗼 «ß»"})]],
    "types": [[("get_weather", {"city": "5", "days": -7, "exact": True, "limit": 2.5})]],
    "null": [[("get_weather", {"city": "null", "limit": None})]],
    "nested": [
        [("get_weather", {"place": {"at": {"x": [1, {"y": "]}"}], "z": {}}, "e": None}, "hours": [[], [1, "2"]]})]
    ],
    "several lines": [[("write-file", {"path": "a/b c.py", "text": 'def f():\n    return "x"\n\n# end'})]],
    "quotes and brackets": [[("write-file", {"text": "a \"b\" 'c' \\n \\ {[(<>)]} & </x> ```"})]],
    "an empty string": [[("write-file", {"path": "", "text": " "})]],
    "no schema": [[("anything", {"a": [1, 2], "b": {"c": True}})]],
    "text that is no call": ["Use <b>tool_call</b> [1], {a}; `f(x)` or 3 < 4.", [PARIS]],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("written", WRITERS)
def test_calls(written: str, scenario: str) -> None:
    name, write = WRITERS[written]
    parts = SCENARIOS[scenario]
    tools = TOOLS
    if name in PYTHON:  # names are Python's
        tools = {key.replace("-", "_"): value for key, value in TOOLS.items()}
        parts = [part if isinstance(part, str) else [(n.replace("-", "_"), a) for n, a in part] for part in parts]
    text = "\n\n".join(part if isinstance(part, str) else write(part) for part in parts)
    found = plain(parsed(lambda: tool_call_parser(name, tools), text))  # type: ignore[arg-type]
    expected: list[Any] = []
    for part in parts:
        expected += [part] if isinstance(part, str) else part
    read = [each.strip() if isinstance(each, str) else (each[0], json.loads(each[1])) for each in found]
    assert read == expected


W = ("get_weather", '{"city": "Paris"}')
GOOD = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
V3_GOOD = 'function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
FUNCTION = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>"
PAIR = "<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
INVOKE = '<｜DSML｜invoke name="get_weather">\n'
CITY = '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'

LITERAL: dict[str, list[tuple[str, list[Any]]]] = {
    "hermes": [
        (f"<tool_call>{GOOD}</tool_call>", [W]),
        (f"Hi\n<tool_call>\n{GOOD}\n</tool_call>\nBye\n", ["Hi", W, "\nBye\n"]),
        (f"<tool_call>\n{GOOD}\n{GOOD}\n</tool_call>", [W, W]),
        (f"<tool_call>\n{GOOD}", [W]),
        (f"<tool_call>\n{GOOD}<tool_call>\n{GOOD}</tool_call>", [W, W]),
        ('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', [W]),
        ('<tool_call>{"id": [1], "name": "get_weather", "x": null, "arguments": {"city": "Paris"}}</tool_call>', [W]),
        ('<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', [W]),
        ('<tool_call>{"name": "now"}</tool_call>', [("now", "{}")]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", "{}")]),
        ('<tool_call>{"name": "now", "arguments": ""}</tool_call>', [("now", "{}")]),
        ('<tool_call>{"n\\u0061me": "now"}</tool_call>', [("now", "{}")]),
        ('<tool_call>{"name": "delete", "arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": 5}</tool_call>', None),
        ("<tool_call>hello</tool_call>", None),
        ("<tool_call>", []),
        ("  <tool_call> \n", []),
        ("<tool_cal", None),
        ("a < b <tool", None),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None),
        ('<tool_call>{"name": "now", "arguments": "Paris"}</tool_call>', None),
        ('<tool_call>{"name": "now", "arguments": "[1]"}</tool_call>', None),
        ('<tool_call>{"arguments": 5, "name": "now"}</tool_call>', None),
        ('<tool_call>{"name": "now", "arguments": nothing}</tool_call>', None),
        ('<tool_call>{"name": "get_weather"', []),
        ('<tool_call>{name: "now"}</tool_call>', [("now", "{}")]),
        ("<tool_call>" + "{" * 300, None),
        (f"<tool_call>oh <tool_call>{GOOD}</tool_call>", ["<tool_call>oh", W]),
        (
            '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>.',
            [("get_weather", '{"city": "Paris"}'), "."],
        ),
        (
            '<tool_call>{"name": "get_weather", "arguments": {"a": 1,}}</tool_call>',
            [("get_weather", '{"a": 1}')],
        ),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa', [("get_weather", '{"city": "Pa"}')]),
        (
            f'<tool_call>{{"name": "now", "arguments": {{"a": 1 2}}}}</tool_call><tool_call>{GOOD}</tool_call>',
            [("now", '{"a": "1 2"}'), ("get_weather", '{"city": "Paris"}')],
        ),
        ("", []),
        (" \n ", [" \n "]),
        ("Just text.\n\n", ["Just text.\n\n"]),
        (f"<tool_call>\n```json\n{GOOD}\n```\n</tool_call>", [W]),
        (f"<tool_call>\n<tool_call>\n{GOOD}\n</tool_call>\n</tool_call>", [W]),
        ('<tool_call>{{"name": "get_weather", "arguments": {{"city": "Paris"}}}}</tool_call>', [W]),
        (f'<tool_call>{{"type": "function", "function": {GOOD}, "id": "a"}}</tool_call>', [W]),
        ('<tool_call>{"function": "functions.get_weather", "input": {"city": "Paris"}}</tool_call>', [W]),
        ('<tool_call>{"name": "get_weather ", "city": "Paris", "id": 7}</tool_call>', [W]),
        ('<tool_call>{"name": "now", "arguments": []}</tool_call>', [("now", "{}")]),
        ("<tool_call>{“name”: “get_weather”, “arguments”: {“city”: `Paris`}}</tool_call>", [W]),
    ],
    "llama3": [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [W]),
        (' \n{"name": "get_weather", "parameters": {"city": "Paris"}}\n', [W]),
        ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', [W]),
        (f"{GOOD}; {GOOD}", [W, W]),
        (f"{GOOD};{GOOD};\n", [W, W]),
        (f"{GOOD}\n{GOOD}", [W, W]),
        (f"<|python_tag|>{GOOD}<|python_tag|>{GOOD}", [W, W]),
        (f"I look. <|python_tag|>{GOOD}", ["I look.", W]),
        (f"{GOOD} I looked.", [W, " I looked."]),
        (f"I look. {GOOD}", [f"I look. {GOOD}"]),
        ('{"name": "Bob", "parameters": {}}', None),
        ('{"name": "now", "age": 7}', None),
        ('{"name": "now"}', None),
        ('<|python_tag|>{"name": "now"}', [("now", "{}")]),
        ('{"a": 1}', None),
        ("{", None),
        ("{}", None),
        ('<|python_tag|>brave_search.call(query="x")', None),
        (f'{{"a": 1}} <|python_tag|>{GOOD}', ['{"a": 1}', W]),
        (f"{GOOD}; {{oops", [W, " {oops"]),
        ('{"name": "get_weather", "parameters": {"city": "Par', [("get_weather", '{"city": "Par"}')]),
    ],
    "mistral": [
        ('[TOOL_CALLS] get_weather [CALL_ID] abc123456 [ARGS] {"city": "Paris"}', [W]),
        (f"[TOOL_CALLS] [{GOOD}]", [W]),
        (f"[TOOL_CALLS][{GOOD},{GOOD}]", [W, W]),
        (f"Hi [TOOL_CALLS] [{GOOD}]\n\nBye", ["Hi", W, "\n\nBye"]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', [W]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', [W, ("now", "{}")]),
        ('[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', [W]),
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a1B2c3D4e"}]', [W]),
        ("[TOOL_CALLS]", []),
        ("[TOOL_CALLS] []", None),
        ("[TOOL_CALLS] nothing", None),
        ("[TOOL_CALLS]now", []),
        ("[TOOL_CALLS]delete{}", None),
        ("[TOOL", None),
        ("a list [1, 2] and [TOOL", None),
        (f"[TOOL_CALLS] [{GOOD}", [W]),
        (f"[TOOL_CALLS] [{GOOD} {GOOD}]", [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Paris"}')]),
        (f"[TOOL_CALLS] [{GOOD}, 5]", [("get_weather", '{"city": "Paris"}')]),
        ('[TOOL_CALLS]now{"a": tru}', [("now", '{"a": "tru"}')]),
        ('[TOOL_CALLS]now{"a": [1, ', [("now", '{"a": [1]}')]),
    ],
    "deepseekv3": [
        (f"{BEGIN}{CALL}{V3_GOOD}{CALL_END}{END}", [W]),
        (f"{BEGIN}{CALL}{V3_GOOD}{CALL_END}\n{CALL}{V3_GOOD}{CALL_END}{END}\n", [W, W]),
        (f"Hi\n{BEGIN}{CALL}{V3_GOOD}{CALL_END}{END}Bye", ["Hi", W, "Bye"]),
        (f"{CALL}{V3_GOOD}{CALL_END}", [W]),
        (f"{BEGIN}{CALL}{V3_GOOD}", [W]),
        (f'{BEGIN}{CALL}function<｜tool▁sep｜>get_weather\n{{"city": "Paris"}}{CALL_END}{END}', [W]),
        (f"{BEGIN}{CALL}function<｜tool▁sep｜>delete\n```json\n{{}}\n```{CALL_END}{END}", None),
        (f"{BEGIN}{CALL}function<｜tool▁sep｜>now\n```json\n[]\n```{CALL_END}{END}", None),
        (f"{BEGIN}{CALL}get_weather{CALL_END}{END}", None),
        (f"{BEGIN}{END}", []),
        (f"{BEGIN}", []),
        ("<｜tool▁calls", None),
        (f"{BEGIN}{CALL}function<｜tool▁sep｜>now", []),
        (f"{BEGIN}{CALL}{V3_GOOD}{CALL_END}{CALL}oops{END}", [W, f"{CALL}oops{END}"]),
        (
            f'{BEGIN}{CALL}function<｜tool▁sep｜>now\n```json\n{{"a" 1}}\n```{CALL_END}{END}',
            [("now", "{}")],
        ),
    ],
    "deepseekv31": [
        (f'{BEGIN}{CALL}get_weather<｜tool▁sep｜>{{"city": "Paris"}}{CALL_END}{END}', [W]),
        (f'{CALL}get_weather<｜tool▁sep｜>{{"city": "Paris"}}{CALL_END}', [W]),
        (
            f"{BEGIN}\n{CALL}now<｜tool▁sep｜>{{}}{CALL_END}\n{CALL}now<｜tool▁sep｜>{{}}{CALL_END}\n{END}",
            [("now", "{}")] * 2,
        ),
        (f"Hi {BEGIN}{CALL}now<｜tool▁sep｜>{{}}{CALL_END}{END} Bye", ["Hi", ("now", "{}"), " Bye"]),
        (f"{BEGIN}{CALL}delete<｜tool▁sep｜>{{}}{CALL_END}{END}", None),
        (f"{BEGIN}{CALL}now{CALL_END}{END}", None),
        (f"{BEGIN}{CALL}now<｜tool▁sep｜>5{CALL_END}{END}", None),
        (f"{BEGIN}{CALL}", []),
        (f"{BEGIN} what", None),
        (f"{CALL[:5]}", None),
        (f"{BEGIN}{CALL}now<｜tool▁sep｜>{{", [("now", "{}")]),
        (f"{BEGIN}{CALL}now<｜tool▁sep｜>{{a}}{CALL_END}{END}", [("now", "{}")]),
    ],
    "deepseekv32": [
        *(
            (
                f'<｜DSML｜function_calls>{INVOKE}<｜DSML｜parameter name="city" string="true">Paris{end}\n'
                '<｜DSML｜parameter name="days" string="false">5</｜DSML｜parameter>\n'
                "</｜DSML｜invoke></｜DSML｜function_calls>",
                [("get_weather", '{"city": "Paris", "days": 5}')],
            )
            for end in ("</｜DSML｜parametr>", "</｜DSML｜parameter", "</parameter>")
        ),
        (f"<｜DSML｜function_calls>\n{INVOKE}{CITY}</｜DSML｜invoke>\n</｜DSML｜function_calls>", [W]),
        (f"{INVOKE}{CITY}</｜DSML｜invoke>", [W]),
        ('<function_calls><invoke name="now"></invoke></function_calls>', [("now", "{}")]),
        ('<invoke name="get_weather"><parameter name="city" string="true">Paris</parameter></invoke> Bye', [W, " Bye"]),
        (
            f'{INVOKE}<｜DSML｜parameter name="days" string="false"> 3 </｜DSML｜parameter></｜DSML｜invoke>',
            [("get_weather", '{"days": 3}')],
        ),
        (
            f'{INVOKE}<｜DSML｜parameter name="days" string="false">soon</｜DSML｜parameter></｜DSML｜invoke>',
            [("get_weather", '{"days": "soon"}')],
        ),
        (
            f'{INVOKE}<｜DSML｜parameter name="days" string="true">3</｜DSML｜parameter></｜DSML｜invoke>',
            [("get_weather", '{"days": "3"}')],
        ),
        (
            f'{INVOKE}<｜DSML｜parameter name="place" string="false">{{"a": [1]}}</｜DSML｜parameter></｜DSML｜invoke>',
            [("get_weather", '{"place": {"a": [1]}}')],
        ),
        (f'Hi {INVOKE}{{"city": "Paris"}}</｜DSML｜invoke>', ["Hi", W]),
        ('<｜DSML｜invoke name="delete"></｜DSML｜invoke>', None),
        ("<｜DSML｜function_calls></｜DSML｜function_calls>", None),
        ("<｜DSML｜invoke city></｜DSML｜invoke>", None),
        ("<｜DSML｜inv", None),
        ("<invoke", []),
        (INVOKE, []),
        (f"{INVOKE}what", None),
        (f"{INVOKE}{CITY}what</｜DSML｜invoke>", [("get_weather", '{"city": "Paris"}')]),
        (f"{INVOKE}{CITY[:47]}", [("get_weather", '{"city": "Pari"}')]),
        (f"{INVOKE}{CITY}", [("get_weather", '{"city": "Paris"}')]),
        (f'{INVOKE}{{"a": }}</｜DSML｜invoke>', [("get_weather", '{"a": null}')]),
    ],
    "kimi_k2": [
        ("a <|tool_calls_section_begin|><|tool_calls_section_end|> b", ["a b"]),
        (f'<|tool_calls_section_begin|>{KIMI}{{"city": "Paris"}}<|tool_call_end|><|tool_calls_section_end|>', [W]),
        (f'{KIMI}{{"city": "Paris"}}<|tool_call_end|>', [W]),
        (
            f'Hi <|tool_calls_section_begin|> {KIMI} {{"city": "Paris"}} <|tool_call_end|> <|tool_calls_section_end|>',
            ["Hi", W],
        ),
        ("<|tool_call_begin|>now:12<|tool_call_argument_begin|>{}<|tool_call_end|>", [("now", "{}")]),
        ("<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>", [("now", "{}")]),
        ("<|tool_call_begin|>functions.delete:0<|tool_call_argument_begin|>{}<|tool_call_end|>", None),
        ("<|tool_call_begin|>functions.now:0{}<|tool_call_end|>", None),
        (f"{KIMI}null", None),
        (f"{KIMI}", []),
        ("<|tool_calls_section_begin|>", []),
        ("<|tool_calls_section_begin|><|tool_calls_section_end|>", []),
        ("<|tool_", None),
        (f'{KIMI}{{"city": "P', [("get_weather", '{"city": "P"}')]),
        (f"{KIMI}{{]<|tool_call_end|>", [("get_weather", "{}")]),
    ],
    "glm45": [
        (f"<tool_call>get_weather\n{PAIR}</tool_call>", [W]),
        (f"<tool_call>\nget_weather\n{PAIR}\n</tool_call>\n", [W]),
        (f"Hi\n<tool_call>get_weather\n{PAIR}</tool_call>Bye", ["Hi", W, "Bye"]),
        ("<tool_call>now\n</tool_call>", [("now", "{}")]),
        ("<tool_call>now</tool_call>", [("now", "{}")]),
        (
            '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>"5"</arg_value>\n</tool_call>',
            [("get_weather", '{"city": "\\"5\\""}')],
        ),
        (
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>5</arg_value></tool_call>",
            [("get_weather", '{"days": 5}')],
        ),
        (
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>five</arg_value></tool_call>",
            [("get_weather", '{"days": "five"}')],
        ),
        (
            "<tool_call>get_weather<arg_key>exact</arg_key><arg_value>True</arg_value></tool_call>",
            [("get_weather", '{"exact": true}')],
        ),
        (
            "<tool_call>get_weather<arg_key>hours</arg_key><arg_value>['a', (1, None)]</arg_value></tool_call>",
            [("get_weather", '{"hours": ["a", [1, null]]}')],
        ),
        ("<tool_call>delete\n</tool_call>", None),
        ("<tool_call>now", []),
        ("<tool_call>now{}</tool_call>", None),
        ("<tool_call></tool_call>", None),
        (
            f"<tool_call>get_weather\n{PAIR}oops</tool_call>",
            [("get_weather", '{"city": "Paris"}')],
        ),
        (
            f"<tool_call>get_weather\n{PAIR}<arg_key>days</arg_key>\n<arg_value>5</arg",
            [("get_weather", '{"city": "Paris", "days": 5}')],
        ),
        ("<tool_call>now\n<arg_key>a", [("now", "{}")]),
        (f"<tool_call>get_weather\n{PAIR[:38]}", [("get_weather", '{"city": "Par"}')]),
    ],
    "qwen3_coder": [
        (f"<tool_call>\n{FUNCTION}\n</tool_call>", [W]),
        (FUNCTION, [W]),
        (f"<tool_call>{FUNCTION}</tool_call>\n<tool_call>{FUNCTION}</tool_call>", [W, W]),
        (f"<tool_call>\n{FUNCTION}\n{FUNCTION}\n</tool_call>", [W, W]),
        (f"Hi\n\n<tool_call>\n{FUNCTION}\n</tool_call>\nBye", ["Hi", W, "\nBye"]),
        ("<function=now></function>", [("now", "{}")]),
        ("<function=get_weather><parameter=city>Paris</parameter></function>", [W]),
        (
            "<function=get_weather>\n<parameter=city>\n\n a \n\n</parameter>\n</function>",
            [("get_weather", '{"city": "\\n a \\n"}')],
        ),
        (
            "<function=get_weather><parameter=city>\n5\n</parameter><parameter=days>\n5\n</parameter></function>",
            [("get_weather", '{"city": "5", "days": 5}')],
        ),
        (
            '<function=get_weather><parameter=place>\n{"a": {"b": []}}\n</parameter></function>',
            [("get_weather", '{"place": {"a": {"b": []}}}')],
        ),
        (
            '<function=get_weather><parameter=city>\nif a < b: "</param>"\n</parameter></function>',
            [("get_weather", '{"city": "if a < b: \\"</param>\\""}')],
        ),
        ("<function=delete></function>", None),
        ("<function=now", []),
        ("<function=now>", []),
        ("<tool_call>\n", []),
        ("<tool_call>hi</tool_call>", None),
        ("<function=now>what</function>", None),
        ("<function=now><parameter=>1</parameter></function>", [("now", "{}")]),
        (
            "<function=get_weather><parameter=city>\nParis\n</parameter>\noops</function>",
            [("get_weather", '{"city": "Paris"}')],
        ),
        ("<function=get_weather><parameter=city>\nPar", [("get_weather", '{"city": "Par"}')]),
        ("<function=get_weather><parameter=city>\nPar\n</para", [("get_weather", '{"city": "Par"}')]),
        ("<function=get_weather><parameter=days>\n1", [("get_weather", '{"days": 1}')]),
    ],
    "pythonic": [
        ('[get_weather(city="Paris")]', [W]),
        ("[get_weather(city='Paris'), now()]", [W, ("now", "{}")]),
        ("[ get_weather( city = 'Paris' , ) , ]", [W]),
        ("<|python_start|>[get_weather(city='Paris')]<|python_end|>", [W]),
        ("Hi [get_weather(city='Paris')] Bye", ["Hi", W, " Bye"]),
        ('[get_weather(city="a\\"b\\n, )]", days=-3)]', [("get_weather", '{"city": "a\\"b\\n, )]", "days": -3}')]),
        ("[get_weather(city='''a\n'b''', days=1)]", [("get_weather", '{"city": "a\\n\'b", "days": 1}')]),
        (
            "[get_weather(place={'a': (1, 2.5), 'b': {}}, exact=true)]",
            [("get_weather", '{"place": {"a": [1, 2.5], "b": {}}, "exact": true}')],
        ),
        ("[now(a=None, b=False)]", [("now", '{"a": null, "b": false}')]),
        ("[delete()]", None),
        ("[1, 2, [3]]", None),
        ("[now]", None),
        ("[now(", None),
        ("[now(1)]", None),
        ("[now(a=b)]", None),
        ("[now(a=open('x'))]", None),
        ("[now(a=1 + 1)]", None),
        ("[now(**{'a': 1})]", None),
        ("[now(a=f'{b}')]", None),
        ("[now(a=b'x')]", None),
        ("[now(a={1: 2})]", None),
        ("[now(a='\\ud800')]", None),
        ("[now(a=1e999)]", None),
        ("[now(a='x)]", None),
        ("[now(a=[1)]", None),
        ("[now(" + "[" * 200, None),
        ("[now(a=" + "-" * 5000 + "1)]", None),
        ("[now(a=" + "9" * 5000 + ")]", None),
        ("now()", None),
        ("[now(), oops]", [("now", "{}"), " oops]"]),
        ("[now() now()]", [("now", "{}"), " now()]"]),
        ("[now()", [("now", "{}")]),
    ],
}
DROPPING = ("kimi_k2", "gpt-oss")
"""Formats of which more is dropped that is no call: an identity that stands for no tool, markup of channels."""
LITERAL["qwen25"] = LITERAL["hermes"]
LITERAL["glm47"] = LITERAL["glm45"]
"""Outputs and what is in them; None for content that stays as it is."""


@pytest.mark.parametrize(("name", "text", "expected"), [(n, *case) for n, cases in LITERAL.items() for case in cases])
def test_literal(name: str, text: str, expected: list[Any] | None) -> None:
    found = plain(parsed(lambda: tool_call_parser(name, TOOLS), text))  # type: ignore[arg-type]
    assert found == ([text] if expected is None else expected)


def test_every_format_has_cases() -> None:
    assert {tool_call_format(name) for name, _ in WRITERS.values()} == set(map(tool_call_format, TOOL_CALL_FORMATS))


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_damaged(name: str) -> None:
    """Whatever is cut off, left out, doubled or put in, a parser neither raises nor depends on the pieces, arguments
    are objects in JSON, and without a call all of the text is content, but for a call that is cut off."""
    chance = random.Random(name)
    write = next(write for of, write in WRITERS.values() if of == name)
    call = ("get_weather", {"city": "Pa\nris", "days": 3, "place": {"a": [1, "x"]}})
    whole = "Hi " + write([call, ("now", {})]) + "\nBye"
    tokens = re.findall(r"<[^>]*>|\[TOOL_CALLS\]|\w+|\s+|.", whole)
    texts = [whole[:cut] for cut in range(0, len(whole), 4)]
    for _ in range(50):
        some = list(tokens)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(some))
            if chance.random() < 0.5:
                del some[place]
            else:
                some.insert(place, chance.choice([*tokens, '"', "{", "}", "\\", ",", "\n", "é"]))
        texts.append("".join(some))
    texts += ["".join(chance.choices(tokens, k=30)) for _ in range(20)]
    for text in texts:
        events = parsed(lambda: tool_call_parser(name, TOOLS), text)  # type: ignore[arg-type]
        for part in plain(events):
            assert isinstance(part, str) or isinstance(json.loads(part[1]), dict)
        if not any(isinstance(event, CallStart) for event in events):
            content = "".join(plain(events))
            assert text.startswith(content) or name in DROPPING, text


def test_arguments_come_as_they_are_written() -> None:
    """A long argument is not held back until its call is whole."""
    long = {"path": "a.txt", "text": "line\n" * 400}
    for name, write in (WRITERS["hermes"], WRITERS["kimi_k2"], WRITERS["qwen3_coder"], WRITERS["deepseekv32"]):
        parser: Parser = tool_call_parser(name, TOOLS)  # type: ignore[arg-type]
        text = write([("write-file", long)])
        half = parser.feed(text[: len(text) // 2])
        arguments = "".join(event.text for event in half if isinstance(event, CallArguments))
        assert js(long).startswith(arguments)
        assert len(arguments) > len(text) // 2 - 200


def test_a_model_gives_its_calls_identities() -> None:
    starts = [
        event
        for event in parsed(lambda: tool_call_parser("kimi_k2", TOOLS), WRITERS["kimi_k2"][1]([PARIS, ("now", {})]))
        if isinstance(event, CallStart)
    ]
    assert [start.id for start in starts] == ["functions.get_weather:0", "functions.now:1"]


def test_forced_calls() -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]'
    assert plain(parsed(lambda: JSONListCalls(TOOLS), text)) == [W, ("now", "{}")]
    assert plain(parsed(lambda: JSONListCalls(TOOLS), "[1]")) == ["[1]"]
