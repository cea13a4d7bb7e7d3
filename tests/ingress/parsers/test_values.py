"""JSON in pieces, and values whose types the tool's schema tells."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from actors.ingress.parsers.detect import detect_reasoning, detect_tool_calls
from actors.ingress.parsers.json_text import JsonScanner, is_json
from actors.ingress.parsers.tool_calls.python_literal import json_of_python
from actors.ingress.parsers.tool_calls.values import parameter_types, value_json

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
            scanner, at = JsonScanner(), 0
            for end in range(1, len(text + rest) + 1):
                at = scanner.scan((text + rest)[:end], at)
            assert scanner.done
            assert (text + rest)[:at] == text


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
    ("integer", '"5"', "5"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_values(name: str, text: str, value: Any) -> None:
    found = json.loads(value_json(text, parameter_types(SCHEMA, name)))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("schema", [None, 5, {}, {"properties": 5}, {"properties": {"a": {"anyOf": []}}}])
def test_a_schema_that_says_nothing(schema: Any) -> None:
    assert value_json("5", parameter_types(schema, "a")) == "5"
    assert value_json("x", parameter_types(schema, "a")) == '"x"'


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


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES: list[tuple[str, str | None, str | None]] = [
    (CHATML, None, None),
    (CHATML + "{{ '<tool_call>' }}", "qwen25", None),
    (
        CHATML + "<tool_call>{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        "qwen25",
        "qwen3",
    ),
    (
        CHATML + "<tool_call><function={% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}",
        "qwen3_coder",
        "qwen3-thinking",
    ),
    ("<｜Assistant｜>```json<｜tool▁call▁begin｜></think>", "deepseekv3", "deepseek-r1"),
    ("<｜Assistant｜><｜tool▁call▁begin｜></think>{% if thinking %}", "deepseekv31", "deepseek-v3"),
    ("[gMASK]<sop><tool_call><arg_key>{% if enable_thinking %}<think></think>", "glm45", "glm45"),
    ("<|tool_calls_section_begin|>", "kimi_k2", None),
    ("{{ '[TOOL_CALLS]' }}", "mistral", None),
    ("<|start_header_id|><|python_tag|>", "llama3", None),
    ("[func_name1(params_name1=params_value1, params_name2=params_value2...)]", "pythonic", None),
    ("", None, None),
]


@pytest.mark.parametrize(("template", "calls", "reasoning"), TEMPLATES)
def test_formats_are_recognised(template: str, calls: str | None, reasoning: str | None) -> None:
    assert detect_tool_calls(template) == calls
    assert detect_reasoning(template) == reasoning
