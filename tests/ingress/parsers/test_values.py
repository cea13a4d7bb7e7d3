"""JSON in pieces, and values whose types the tool's schema tells."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from llm_runtime.actors.parsers.json_text import LenientJson, is_json, repaired
from llm_runtime.actors.parsers.reasoning import detect_reasoning
from llm_runtime.actors.parsers.tool_calls import detect_tool_calls
from llm_runtime.actors.parsers.tool_calls.python_literal import json_of_python
from llm_runtime.actors.parsers.tool_calls.values import Kind, parameter_kind, value_json

JSON = [
    "{}",
    "[]",
    '""',
    "0",
    "-0.5e+10",
    "true",
    "null",
    '{"a": [1, {"b": "\\u00e9\\n\\""}, false], "": null}',
    ' { "a" : [ ] } '.strip(),
    "[[[[1]]],2]",
    "[1E5, -1, 0.0]",
]
NOT_JSON = [
    "",
    "{",
    "{,}",
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    "{'a': 1}",
    "[1,]",
    "[,1]",
    "[1 2]",
    "01",
    "1.",
    ".5",
    "+1",
    "tru",
    "NaN",
    '"\\x"',
    '"\\u12g4"',
    '"a\nb"',
    "[}",
    "{]",
    '{"a":1]',
    "{} ",
    "[" * 1000,
]


def test_json_agrees_with_the_standard_library() -> None:
    for text in JSON:
        json.loads(text)
        assert is_json(text), text
    for text in NOT_JSON:
        assert not is_json(text), text
    chance = random.Random(1)
    for _ in range(3000):
        characters = list(chance.choice(JSON))
        for _ in range(chance.randrange(3)):
            characters[chance.randrange(len(characters))] = chance.choice('{}[]",:0a\\ e-.')
        text = "".join(characters)
        try:
            json.loads(text, parse_constant=float)
            good = text == text.strip()
        except ValueError:
            good = False
        assert is_json(text) == good, text


def test_where_json_ends() -> None:
    for text in JSON[:3] + JSON[7:]:
        for rest in ("", "}", " x", '"'):
            scanner, at = LenientJson(), 0
            for end in range(1, len(text + rest) + 1):
                at = scanner.scan((text + rest)[:end], at)
            assert scanner.done
            assert (text + rest)[:at] == text
            assert scanner.take() == text


SCHEMA = {
    "properties": {
        "string": {"type": "string"},
        "integer": {"type": "integer"},
        "number": {"type": "number"},
        "boolean": {"type": "boolean"},
        "object": {"type": "object"},
        "array": {"type": "array", "items": {}},
        "nullable": {"type": ["string", "null"]},
        "any of": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
        "both": {"allOf": [{"type": ["integer", "string"]}, {"type": ["string", "null"]}]},
        "choice": {"enum": ["1", "2"]},
        "constant": {"const": 1},
        "reference": {"$ref": "#/$defs/N~1"},
        "nowhere": {"$ref": "#/$defs/none"},
        "endless": {"$ref": "#/properties/endless"},
        "no type": {"description": "x"},
        "odd": {"type": "decimal"},
        "null or choice": {"enum": ["ok", None]},
        "text or number": {"enum": ["7", 8]},
        "text or flag": {"enum": ["true", 7]},
        "the word null": {"const": "null"},
        "listed number": {"type": "number", "enum": [1, 2]},
        "number or auto": {"type": ["number", "string"], "enum": [1, "auto"]},
        "text or object": {"type": ["string", "object"]},
        "number or text of one": {"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "integer"}]},
        "spelled": {"type": "int"},
        "wrong": 5,
    },
    "$defs": {"N/": {"type": "number"}},
}
VALUES: list[tuple[str, str, Any]] = [
    ("string", "5", "5"),
    ("string", "null", "null"),
    ("string", '{"a": 1}', '{"a": 1}'),
    ("string", ' "x"\n', ' "x"\n'),
    ("integer", "5", 5),
    ("integer", " -5\n", -5),
    ("integer", "+5", 5),
    ("integer", "007", 7),
    ("integer", "5.0", 5),
    ("integer", "5.5", "5.5"),
    ("integer", "123456789012345678901234567890", 123456789012345678901234567890),
    ("integer", "five", "five"),
    ("integer", "", ""),
    ("number", "2.5", 2.5),
    ("number", "1e-3", 0.001),
    ("number", ".5", 0.5),
    ("number", "1.", 1),
    ("number", "-0.5", -0.5),
    ("number", "3", 3),
    ("number", "NaN", "NaN"),
    ("number", "1,5", "1,5"),
    ("boolean", "true", True),
    ("boolean", "False", False),
    ("boolean", "yes", "yes"),
    ("object", '{"a": [1]}', {"a": [1]}),
    ("object", "{'a': True}", {"a": True}),
    ("object", "{a}", "{a}"),
    ("object", "[1]", "[1]"),
    ("array", "[1, 2]", [1, 2]),
    ("array", "['x', None]", ["x", None]),
    ("array", "[open('x')]", "[open('x')]"),
    ("nullable", "None", None),
    ("nullable", "5", "5"),
    ("any of", "5", 5),
    ("any of", "null", None),
    ("either", "5", 5),
    ("either", "x", "x"),
    ("both", "5", "5"),
    ("choice", "1", "1"),
    ("constant", "1", 1),
    ("reference", "1.5", 1.5),
    ("nowhere", "1.5", 1.5),
    ("endless", "1", 1),
    ("no type", "x y", "x y"),
    ("no type", "[1]", [1]),
    ("odd", "1", 1),
    ("wrong", "true", True),
    ("unknown", "x", "x"),
    ("integer", '"5"', 5),
    ("integer", '\\"5\\"', 5),
    ("integer", "1.25e2", 125.0),
    ("integer", "123abc", "123abc"),
    ("number", '"42"', 42),
    ("number", '"x"', "x"),
    ("array", '[{\\"id\\":1}]', [{"id": 1}]),
    ("array", '"[1]"', [1]),
    ("array", "[1, 2,]", [1, 2]),
    ("object", '{"a": "x\ny"}', {"a": "x\ny"}),
    ("nullable", "null", None),
    ("nullable", '"null"', "null"),
    ("nullable", '"x"', '"x"'),
    ("either", '"5"', "5"),
    ("null or choice", "null", None),
    ("null or choice", "ok", "ok"),
    ("text or number", "7", "7"),
    ("text or number", "8", 8),
    ("text or flag", "true", "true"),
    ("the word null", "null", "null"),
    ("listed number", '"1"', 1),
    ("number or auto", "1", 1),
    ("number or auto", "auto", "auto"),
    ("text or object", "7", "7"),
    ("text or object", '{"a": 1}', {"a": 1}),
    ("number or text of one", "7", 7),
    ("spelled", "5", 5),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_values(name: str, text: str, value: Any) -> None:
    found = json.loads(value_json(text, parameter_kind(SCHEMA, name)[0]))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("schema", [None, 5, {}, {"properties": 5}, {"properties": {"a": {"anyOf": []}}}])
def test_a_schema_that_says_nothing(schema: Any) -> None:
    assert value_json("5", parameter_kind(schema, "a")[0]) == "5"
    assert value_json("x", parameter_kind(schema, "a")[0]) == '"x"'


def test_python_literals() -> None:
    assert (
        json_of_python("{'a': [1, -2.5, (True, None)], \"b\": 'é\\x41'}") == '{"a": [1, -2.5, [true, null]], "b": "éA"}'
    )
    for text in (
        "a",
        "f()",
        "1 + 1",
        "{1: 2}",
        "{**{}}",
        "[x for x in y]",
        "b'x'",
        "...",
        "1j",
        "",
        "'\\ud800'",
        "(" * 99,
    ):
        assert json_of_python(text) is None


TEXT_OR_COUNT = [
    {"properties": {"kind": {"const": "text"}, "value": {"type": "string"}}},
    {"properties": {"kind": {"enum": ["count"]}, "value": {"type": "integer"}}},
]


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": TEXT_OR_COUNT},
        {"anyOf": TEXT_OR_COUNT[::-1]},
        {"$defs": {"a": TEXT_OR_COUNT[0], "b": TEXT_OR_COUNT[1]}, "oneOf": [{"$ref": f"#/$defs/{x}"} for x in "ba"]},
        {"oneOf": [{"allOf": [each, {"required": ["kind"]}]} for each in TEXT_OR_COUNT]},
    ],
)
def test_alternatives_at_the_root(schema: Any) -> None:
    assert parameter_kind(schema, "value") == (Kind(frozenset(("string", "integer"))), False)
    assert parameter_kind(schema, "value", {"kind": "text"}) == (Kind(frozenset(("string",))), True)
    assert parameter_kind(schema, "value", {"kind": "count"}) == (Kind(frozenset(("integer",))), True)


def test_a_root_that_refers() -> None:
    schema = {"$defs": {"A": {"properties": {"v": {"type": "string"}}}}, "$ref": "#/$defs/A"}
    assert value_json("7", parameter_kind(schema, "v")[0]) == '"7"'
    schema = {"allOf": [{"properties": {"v": {}}}, {"properties": {"v": {"type": "string"}}}]}
    assert value_json("null", parameter_kind(schema, "v")[0]) == '"null"'
    assert parameter_kind({"$ref": "#"}, "v")[0].unknown


REPAIRS: list[tuple[str, str | None]] = [
    ('{"a": 1,}', '{"a": 1}'),
    ("[1,,2,]", "[1,2]"),
    ("{'a': 'it\\'s', \"b\": 'don't'}", '{"a": "it\'s", "b": "don\'t"}'),
    ('{"a": True, "b": None, "c": NaN}', '{"a": true, "b": null, "c": null}'),
    ('{"a": "x\ny\tz\x00"}', '{"a": "x\\ny\\tz\\u0000"}'),
    ('{"a": "\\d \\u12g4 \\ud83d"}', '{"a": "\\\\d \\\\u12g4 \\ufffd"}'),
    ('{"a": "he said "hi" to me"}', '{"a": "he said \\"hi\\" to me"}'),
    ("{a: b c, d_1: 007}", '{"a": "b c", "d_1": 7}'),
    ("{'a': (1, 2,)}", '{"a": [1, 2]}'),
    ('{"a": [1, 2}', '{"a": [1, 2]}'),
    ('{"a": 1]}', '{"a": 1}'),
    ('{"a": "x"\n"b": 2}', '{"a": "x"\n,"b": 2}'),
    ("[{} {}]", "[{} ,{}]"),
    ('{"a": , "b":}', '{"a": null, "b":null}'),
    ('{"a": .5, "b": +1, "c": 1.}', '{"a": 0.5, "b": 1, "c": 1}'),
    ('{"a": "x" "b": "y"; "c": 3}', '{"a": "x" ,"b": "y", "c": 3}'),
    ('{"a": "say "no", and "go"", "b": "x"}', '{"a": "say \\"no\\", and \\"go\\"", "b": "x"}'),
    ('{"a": 0x1F, "b": -Infinity, "c": 1_000}', '{"a": 31, "b": null, "c": 1000}'),
    ('{/* 1 */"a": 1, // one\n"b": "x" # two\n, "c": #f00}', '{"a": 1, \n"b": "x" \n, "c": "#f00"}'),
    ('["a", # b\n"c", http://x/y]', '["a", \n"c", "http://x/y"]'),
    ("{“a”: “x”, `b`: `it's`}", '{"a": "x", "b": "it\'s"}'),
    ('{{"a": {{"b": 1}}, "c" = 2}}', '{"a": {"b": 1}, "c" : 2}'),
    ("{a}", None),
    ("[open('x')]", None),
    ("[b'x']", None),
    ("{1: 2}", None),
    ('{"a": 1', None),
]


@pytest.mark.parametrize(("text", "expected"), REPAIRS)
def test_what_is_meant_as_json(text: str, expected: str | None) -> None:
    assert repaired(text) == expected
    if expected is not None:
        json.loads(expected)


def test_whatever_is_cut_off_is_closed() -> None:
    chance = random.Random(2)
    whole = '{"name": "x\\u00e9", "b": [1, {"c": true, \'d\': None}], "e": "f</t> g", }'
    for _ in range(2000):
        characters = list(whole)
        for _ in range(chance.randrange(4)):
            characters[chance.randrange(len(characters))] = chance.choice("{}[]\",:0a\\ e'-.\n<")
        text = "".join(characters)[: chance.randrange(1, len(whole))]
        found = set()
        for cut in (0, 1, len(text) // 2, len(text) - 1):
            scanner = LenientJson(("</t>",))
            rest = text[scanner.scan(text[:cut], 0) : cut] if cut else ""
            out = scanner.take()
            if not scanner.done and not scanner.failed:
                scanner.scan(rest + text[cut:], 0)
            found.add(out + scanner.close())
        assert len(found) == 1, text
        closed = found.pop()
        assert not closed or json.loads(closed) is not None


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
THINKS = "{{ content.split('</think>')[-1] }}"
TEMPLATES: list[tuple[str, str | None, str | None]] = [
    (CHATML, None, None),
    (CHATML + "{{ '<tool_call>' }}", "qwen25", None),
    (CHATML + "<tool_call>{% if enable_thinking is false %}<think></think>{% endif %}", "qwen25", "qwen3"),
    (CHATML + "<tool_call><function=...><parameter=...>" + THINKS, "qwen3_coder", "qwen3"),
    ("<｜Assistant｜>```json<｜tool▁call▁begin｜></think>", "deepseekv3", "deepseek-r1"),
    ("<｜Assistant｜><｜tool▁call▁begin｜></think>{% if thinking %}", "deepseekv31", "deepseek-v3"),
    ("<｜DSML｜invoke", "deepseekv32", None),
    ("[gMASK]<sop><tool_call><arg_key>{% if enable_thinking %}<think></think>", "glm45", "glm45"),
    ("<|tool_calls_section_begin|>", "kimi_k2", None),
    ("<|tool_calls_section_begin|>" + THINKS, "kimi_k2", "kimi_k2"),
    ("{{ '[TOOL_CALLS]' }}", "mistral", None),
    ("[THINK]{{ '[TOOL_CALLS]' }}", "mistral", "mistral"),
    ("<|start_header_id|><|python_tag|>", "llama3", None),
    ("[func_name1(params_name1=params_value1, params_name2=params_value2...)]", "pythonic", None),
    ("<minimax:tool_call><invoke name=" + THINKS, "minimax-m2", "minimax"),
    ("<seed:tool_call><function=f><parameter=a><seed:think>", "seed_oss", "seed_oss"),
    ("<steptml:invoke name=" + THINKS, "step3", "step3"),
    ("<tool_calls><tool_call>f<tool_sep><arg_key>" + THINKS, "hunyuan", "hunyuan"),
    ("助手：<tool_calls>[{}]<answer>" + THINKS, "hunyuan_a13b", "hunyuan"),
    ("<tool_call><response>" + THINKS, "qwen25", "ernie45"),
    ("<TOOLCALL>[", "nemotron_json", None),
    ("<|tool_call|>Here is my thought process:", "granite", "granite"),
    ("<function_call> {", "granite-20b-fc", None),
    ("<|tool|>{{ tools }}<|/tool|>", "phi4_mini_json", None),
    ("<functions>{{ tools }}</functions> <function_calls>" + THINKS, "olmo3", "olmo3"),
    ("<|tool_list_start|>", "lfm2", None),
    ("<|START_ACTION|><|START_THINKING|>", "cohere_command4", "cohere_command4"),
    ("<|action_start|><|plugin|>", "interns1", None),
    ("make calls in a single JSON array: <tool_call>", "xlam", None),
    ("<tool_calls>", "jamba", None),
    ("```tool_code", "gemma3", None),
    ("<start_function_call>call:", "functiongemma", None),
    ("<|tool_call>call:<|channel>thought", "gemma4", "gemma4"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "gpt-oss", "gpt-oss"),
    ("◁think▷", None, "kimi"),
    ("", None, None),
]


@pytest.mark.parametrize(("template", "calls", "reasoning"), TEMPLATES)
def test_formats_are_recognised(template: str, calls: str | None, reasoning: str | None) -> None:
    assert detect_tool_calls(template) == calls
    assert detect_reasoning(template) == reasoning
