"""What models write that is not quite in their format, by kind, and how long reading it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llm_runtime.actors.parsers.events import CallStart, Parser
from llm_runtime.actors.parsers.reasoning import REASONING_FORMATS, reasoning_parser
from llm_runtime.actors.parsers.tool_calls import TOOL_CALL_FORMATS, tool_call_parser
from llm_runtime.actors.parsers.tool_calls.json_list import ForcedCalls

from .outputs import TOOLS, parsed, plain

EXEC = {"exec": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}}
EDIT: dict[str, Any] = {
    "edit": {
        "type": "object",
        "properties": {"old": {"type": "string"}, "new": {"type": "string"}, "n": {"type": "integer"}},
    },
    "submit": None,
}
UNION = {
    "set": {
        "oneOf": [
            {"properties": {"kind": {"const": "text"}, "value": {"type": "string"}}},
            {"properties": {"kind": {"const": "count"}, "value": {"type": "integer"}}},
        ]
    }
}
SUBMIT = ("submit", {})


def edit(**arguments: Any) -> tuple[str, dict[str, Any]]:
    return "edit", arguments


def found(name: str, text: str, tools: dict[str, Any] = EDIT) -> list[Any]:
    events = plain(parsed(lambda: tool_call_parser(name, tools), text))
    return [each if isinstance(each, str) else (each[0], json.loads(each[1])) for each in events]


FOO = "<tool_call>\n<function=edit>\n<parameter=old>\nfoo\n"
N = "<parameter=n>\n3\n</parameter>\n"
END = "</function>\n</tool_call>"
TAGS: list[tuple[str, str, list[Any]]] = [
    ("qwen3_coder", f"{FOO}<parameter=new>\nbar\n</parameter>\n{END}", [edit(old="foo", new="bar")]),
    ("qwen3_coder", f"{FOO}</parameter1>\n{N}{END}", [edit(old="foo", n=3)]),
    ("qwen3_coder", f"{FOO}</parameter_function>\n{END}", [edit(old="foo")]),
    ("qwen3_coder", f"{FOO}</parameter\n{N}{END}", [edit(old="foo", n=3)]),
    ("qwen3_coder", f"{FOO}</parameterList>\n</parameter>\n{N}{END}", [edit(old="foo\n</parameterList>", n=3)]),
    ("qwen3_coder", f"{FOO}see </function> here\n</parameter>\n{END}", [edit(old="foo\nsee </function> here")]),
    ("qwen3_coder", f"{FOO}</parameter>\n</tool_call>\nBye", [edit(old="foo"), "\nBye"]),
    ("qwen3_coder", f"{FOO}{END}\nBye", [edit(old="foo"), "\nBye"]),
    ("qwen3_coder", f"{FOO}</tool_call>\nBye", [edit(old="foo"), "\nBye"]),
    ("qwen3_coder", '<function="edit"><parameter="n">3</parameter></function>', [edit(n=3)]),
    ("seed_oss", f"{FOO}{N}{END}".replace("tool_call", "seed:tool_call"), [edit(old="foo", n=3)]),
    (
        "glm45",
        "<tool_call>edit\n<arg_key>old</arg_key>\n<arg_value>foo\n<arg_key>new</arg_key><arg_value>b</arg_value></tool_call>",
        [edit(old="foo", new="b")],
    ),
    ("glm45", "<tool_call>edit<arg_key>old<arg_value>foo</tool_call>Bye", [edit(old="foo"), "Bye"]),
    ("deepseekv32", '<｜DSML｜tool_calls><｜DSML｜invoke name="submit"/></｜DSML｜tool_calls>', [SUBMIT]),
    (
        "deepseekv32",
        '<｜DSML｜invoke name="edit"><｜DSML｜parameter name="old" string="true">a'
        '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter></｜DSML｜invoke>',
        [edit(old="a", n=3)],
    ),
    ("minimax-m2", "<minimax:tool_call><invoke name='edit'><parameter name='n'>3</invoke>", [edit(n=3)]),
]
JSON: list[tuple[str, list[Any]]] = [
    ('{"name": "edit", "arguments": {"old": "a\nb\tc"}}', [edit(old="a\nb\tc")]),
    ('{"name": "edit", "arguments": {"n": 1, "new": None, "old": True}}', [edit(n=1, new=None, old=True)]),
    ('{"name": "edit", "arguments": {"n": 1}}}', [edit(n=1)]),
    ('{"name": "edit", "arguments": {"n": 1}', [edit(n=1)]),
    ('{"name": "edit", "arguments": {"n": 1', [edit(n=1)]),
    ('{"name": "edit", "arguments": {"old": "a"', [edit(old="a")]),
    ('{"name": "edit", "arguments": {"n": 1,},}', [edit(n=1)]),
    ("{'name': 'edit', 'arguments': {'old': 'it\\'s'}}", [edit(old="it's")]),
    ('{name: "edit", arguments: {n: 1}}', [edit(n=1)]),
    ('{"name": "edit", "arguments": {"old": "say "hi" now"}}', [edit(old='say "hi" now')]),
    ('[{"name": "edit", "arguments": {"n": 1}}, {"name": "submit"}]', [edit(n=1), SUBMIT]),
    ('[{"name": "submit"}, "junk", 5, null]', [SUBMIT]),
    ('{"name": "submit", "arguments": {}}{"name": "submit", "arguments": {}}', [SUBMIT, SUBMIT]),
]
FRAMES = {
    "hermes": ("<tool_call>\n", "\n</tool_call>"),
    "jamba": ("<tool_calls>", "</tool_calls>"),
    "nemotron_json": ("<TOOLCALL>", "</TOOLCALL>"),
    "interns1": ("<|action_start|><|plugin|>\n", "<|action_end|>"),
    "granite": ("<tool_call>", "</tool_call>"),
    "cohere_command4": ("<|START_ACTION|>", "<|END_ACTION|>"),
}
OTHERS: list[tuple[str, str, list[Any]]] = [
    ("pythonic", "[bad(x=b'z'), edit(old='a')]", [edit(old="a")]),
    ("pythonic", "[edit(n=b'z'), submit(), edit(n=f())]", [SUBMIT]),
    ("pythonic", "[edit('a', n=07)]", [edit(old="a", n=7)]),
    ("pythonic", "[edit(old='a\nb', new='c')]", [edit(old="a\nb", new="c")]),
    ("pythonic", "[bad(x=b'z')]", ["[bad(x=b'z')]"]),
    ("llama3", "<|python_tag|>{'name': 'edit', 'parameters': {'old': 'x'}}", [edit(old="x")]),
    ("llama3", '<|python_tag|>{broken}; {"name": "edit", "parameters": {"n": 1}}', [edit(n=1)]),
    ("llama3", '<|python_tag|>{"name": "edit" 5}<|python_tag|>{"name": "submit"}', [SUBMIT]),
    ("lfm2", "<|tool_call_start|>[edit(from=1)]<|tool_call_end|>", [("edit", {"from": 1})]),
    ("lfm2", '<|tool_call_start|>[{"name": "submit"}]<|tool_call_end|>', [SUBMIT]),
    ("olmo3", "<function_calls>edit(n=1)\nsubmit()</function_calls>", [edit(n=1), SUBMIT]),
    ("gemma3", "```tool_code\nprint(edit(n=1))\n```\nBye", [edit(n=1), "\nBye"]),
    ("gemma4", '<|tool_call>call:edit{old:<|"|>}<|"|>,n:1', [edit(old="}")]),
    ("gpt-oss", "<|start|>assistant to=functions.submit<|channel|>commentary json<|message|>", []),
    ("gpt-oss", "<|channel|>commentary to=submit<|message|><|call|>", [SUBMIT]),
    ("xlam", "```python\nx = [1]\n```", ["```python\nx = [1]\n```"]),
]


@pytest.mark.parametrize(("name", "text", "expected"), TAGS + OTHERS)
def test_tags_and_others(name: str, text: str, expected: list[Any]) -> None:
    assert found(name, text) == expected


@pytest.mark.parametrize(("text", "expected"), JSON)
@pytest.mark.parametrize("name", FRAMES)
def test_json(name: str, text: str, expected: list[Any]) -> None:
    before, after = FRAMES[name]
    assert found(name, f"Hi\n{before}{text}{after}\nBye") == ["Hi", *expected, "\nBye"]


@pytest.mark.parametrize("identity", ["functions.exec:0", "functions_exec_1", "exec", "exec:3", "call_abc123", "0"])
@pytest.mark.parametrize("section", ["tool_calls_section", "tool_call_section"])
@pytest.mark.parametrize("tools", [EXEC, {**EXEC, **EDIT}])
def test_identities(identity: str, section: str, tools: dict[str, Any]) -> None:
    call = f'<|tool_call_begin|>{identity} <|tool_call_argument_begin|>{{"cmd": "ls"}}<|tool_call_end|>'
    text = f"Hi<|{section}_begin|>{call}{call}<|{section}_end|>"
    events = parsed(lambda: tool_call_parser("kimi_k2", tools), text)
    assert plain(events) == ["Hi", ("exec", '{"cmd": "ls"}'), ("exec", '{"cmd": "ls"}')]
    assert {event.id for event in events if isinstance(event, CallStart)} == {identity}


def test_an_identity_that_two_tools_fit() -> None:
    tools = {"one": EXEC["exec"], "two": EXEC["exec"], **EDIT}
    call = '<|tool_call_begin|>{}<|tool_call_argument_begin|>{{"cmd": "ls"}}<|tool_call_end|>'
    text = f"<|tool_calls_section_begin|>{call.format('7')}{call.format('functions.two:1')}<|tool_calls_section_end|>"
    assert found("kimi_k2", text, tools) == [("two", {"cmd": "ls"})]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("kind", "value"), [("text", "7"), ("count", 7)])
def test_alternatives_wait_for_what_tells_them_apart(kind: str, value: Any, first: bool) -> None:
    pairs = [("kind", kind), ("value", "7")][:: 1 if first else -1]
    body = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in pairs)
    text = f"<tool_call>set{body}</tool_call>"
    assert found("glm45", text, UNION) == [("set", {"kind": kind, "value": value})]


def test_a_forced_call_that_is_cut_off() -> None:
    for text in ("[", '[{"name": "edit', '[{"name": "edit", "parameters": '):
        assert plain(parsed(lambda: ForcedCalls(EDIT), text)) == []
    cut = '[{"name": "edit", "parameters": {"old": "a'
    assert plain(parsed(lambda: ForcedCalls(EDIT), cut)) == [("edit", '{"old": "a"}')]


def operations(make: Callable[[], Parser], text: str) -> int:
    """Functions that are called to read a text in characters."""
    parser, count = make(), 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        for character in text:
            parser.feed(character)
        parser.finish()
    finally:
        sys.setprofile(None)
    return count


BEGUN = ["", "<tool_call>{}", "<function=edit><parameter=old>", '<tool_call>{"name": "edit", "arguments": {"old": "']
UNITS = [" ", "\n", "<", "[", "{", "<tool_call>", "</parameter", '"', "\\", "[submit("]


BY_DEPTH = ("xlam", "pythonic", "gemma3")
"""Formats in which each bracket may begin a list of calls, which is read as deep as lists may be nested: a bounded
number of times, but more than texts of this length can show."""


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_reading_is_linear(name: str) -> None:
    for begun in BEGUN:
        for unit in UNITS:
            if unit[0] == "[" and name in BY_DEPTH:
                continue
            short, long = (
                operations(lambda: tool_call_parser(name, {**TOOLS, **EDIT}), begun + unit * (size // len(unit)))
                for size in (64, 256)
            )
            assert long < 6 * short + 500, (begun, unit)


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_reading_reasoning_is_linear(name: str) -> None:
    for unit in (*UNITS, "</think>", "<think>"):
        short, long = (
            operations(lambda: reasoning_parser(name, True), unit * (size // len(unit))) for size in (64, 256)
        )
        assert long < 6 * short + 500, unit


def test_a_long_run_is_held_in_pieces() -> None:
    """200,000 blanks once held a parser for 11 seconds: all that was held back was copied with each piece."""
    parser = tool_call_parser("qwen25", EDIT)
    for _ in range(1000):
        parser.feed(" " * 7)
    assert len(parser._text) < 100  # type: ignore[attr-defined]
    assert sum(map(len, parser._kept)) > 6900  # type: ignore[attr-defined]
