"""Grammars with an end: however deep a model wants to go, its answer closes, and is what the schema allows."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from actors.grammar import BadGrammar, xgrammar
from actors.grammar.bounded import LEVELS, bounded

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def described(name: str, of: Any, required: bool) -> dict[str, Any]:
    """A schema that holds itself under a name."""
    properties = {"v": {"type": "integer", "minimum": 0, "maximum": 9}, name: of}
    needed = ["v", name] if required else ["v"]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


NODE = {"$ref": "#/$defs/node"}
LEAF = {"enum": [0, 1]}
RECURSIVE: dict[str, Any] = {
    "optional": described("next", {"$ref": "#"}, False),
    "a choice": described("next", {"anyOf": [LEAF, {"$ref": "#"}]}, True),
    "two of them": {
        "$defs": {"node": {"anyOf": [LEAF, {"type": "array", "prefixItems": [NODE, NODE], "items": False}]}},
        **NODE,
    },
    "lists": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "a list that has to be": described("kids", {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, True),
    "by way of another": {
        "$defs": {
            "node": described("other", {"$ref": "#/$defs/other"}, True),
            "other": {"type": "array", "items": NODE, "maxItems": 1},
        },
        **NODE,
    },
    "a way without end beside one with": {
        "$defs": {"node": described("next", {"$ref": "#/$defs/node"}, True)},
        "anyOf": [LEAF, NODE],
    },
    "a list without end beside one with": {"type": "array", "items": described("next", {"$ref": "#/items"}, True)},
}


def compiled(grammar: Any) -> Any:
    info = xgrammar().TokenizerInfo([*LETTERS, "</s>"], stop_token_ids=[len(LETTERS)])
    return xgrammar().GrammarCompiler(info, max_threads=1, cache_enabled=False).compile_grammar(grammar)


def of_schema(schema: Any) -> Any:
    return xgrammar().Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)


def allows(automaton: Any, text: str) -> bool:
    matcher = xgrammar().GrammarMatcher(automaton)
    return bool(matcher.accept_string(text) and matcher.is_completed())


def written(automaton: Any, rank: Any, most: int) -> str | None:
    """What a model writes that always takes the letter of the highest rank; None if it has no end."""
    matcher = xgrammar().GrammarMatcher(automaton)
    mask = np.zeros((1, -(-(len(LETTERS) + 1) // 32)), np.int32)
    text = ""
    while len(text) < most:
        matcher.fill_next_token_bitmask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(LETTERS)]).tolist()
        if not allowed:
            return text if matcher.is_completed() else None
        letter = max((LETTERS[index] for index in allowed), key=rank)
        matcher.accept_string(letter)
        text += letter
    return None


def deepens(letter: str) -> tuple[bool, bool, str]:
    """Opens what can be opened, and goes on where it could close."""
    return letter in "[{", letter not in "]}", letter


@pytest.mark.parametrize("name", RECURSIVE)
def test_what_goes_deeper_wherever_it_can_comes_to_an_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.grammar.bounded.LEVELS", 5)  # of a tree of two branches, 32 leaves
    schema = RECURSIVE[name]
    assert written(compiled(of_schema(schema)), deepens, 2000) is None
    text = written(compiled(bounded(of_schema(schema))), deepens, 5000)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


def test_depths() -> None:
    chain = compiled(bounded(of_schema(RECURSIVE["a choice"])))
    lists = compiled(bounded(of_schema(RECURSIVE["lists"])))
    free = compiled(bounded(of_schema({"type": "object"})))
    for deep in (1, LEVELS):
        assert allows(chain, '{"v": 1, "next": ' * deep + "0" + "}" * deep)
        assert allows(lists, "[" * deep + "]" * deep)
        assert allows(free, '{"a": ' * deep + "[1, null]" * (deep < LEVELS) + "1" * (deep == LEVELS) + "}" * deep)
        assert allows(free, '{"a": [' * (deep // 2) + "]}" * (deep // 2)) or deep < 2
    deep = LEVELS + 2
    assert not allows(chain, '{"v": 1, "next": ' * deep + "0" + "}" * deep)
    assert not allows(lists, "[" * deep + "]" * deep)
    assert not allows(free, '{"a": ' * deep + "1" + "}" * deep)


def test_all_that_leads_to_an_end_is_allowed_on_the_last_level() -> None:
    inner = {"anyOf": [{"type": "null"}, {"type": "array", "items": NODE}, {"type": "number"}]}
    schema = {"$defs": {"node": {"anyOf": [inner, {"type": "array", "items": {"type": "number"}}]}}, **NODE}
    automaton = compiled(bounded(of_schema(schema)))
    for deep in (LEVELS - 1, LEVELS):
        for leaf in ("1.5", "null", "[]", "[1, 2]"):
            assert allows(automaton, "[1, " * deep + leaf + "]" * deep)
    assert not allows(automaton, "[1, " * (LEVELS + 2) + "null" + "]" * (LEVELS + 2))


def test_lists_and_strings_are_as_long_as_before() -> None:
    free = compiled(bounded(of_schema({"type": "object"})))
    members = ", ".join(f'"{"k" * 300}{index}": [{", ".join(["-1.5e3"] * 100)}]' for index in range(100))
    assert allows(free, "{" + members + "}")
    deep = "[" * 60 + "7" * 17 + "]" * 60  # nothing holds itself
    schema: Any = {"type": "integer", "minimum": 0}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    assert allows(compiled(bounded(of_schema(schema))), deep)


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("limits", [{}, {"minimum": 0}, {"maximum": 5}, {"minimum": -3, "maximum": 10**18}])
def test_digits_have_an_end(kind: str, limits: dict[str, int]) -> None:
    most = {"0": 0, "9": 1, "-": -1}
    for rank in (
        lambda letter: (letter.isdigit(), letter),
        lambda letter: (letter in ".-", letter.isdigit(), most.get(letter, 0)),
        lambda letter: (letter in "eE", letter.isdigit(), letter == "0"),
    ):
        schema = {"type": kind, **limits}
        text = written(compiled(bounded(of_schema(schema))), rank, 100)
        assert text is not None
        jsonschema.validate(json.loads(text), schema)


def test_multiples_are_as_long_as_other_integers() -> None:
    automaton = compiled(bounded(of_schema({"type": "integer", "multipleOf": 3})))
    assert allows(automaton, "0")
    assert allows(automaton, "-12")
    assert allows(automaton, "3" * 17)
    assert not allows(automaton, "3" * 16 + "4")
    text = written(automaton, str.isdigit, 100)
    assert text is not None
    assert int(text) % 3 == 0


def test_multiples_of_the_same_integer_share_their_rules() -> None:
    one = {"type": "integer", "multipleOf": 30}
    schema = {"type": "array", "prefixItems": [one, one, {"type": "integer", "multipleOf": 7}], "items": False}
    grammar = bounded(of_schema(schema))
    automaton = compiled(grammar)
    assert allows(automaton, "[60, -90, 49]")
    assert not allows(automaton, "[60, 7, 49]")
    assert not allows(automaton, "[60, 90, 50]")
    assert len(str(grammar).splitlines()) < len(str(bounded(of_schema(one))).splitlines()) * 1.5


def test_a_schema_of_many_that_refer_to_each_other_has_fewer_levels_and_an_end() -> None:
    many = 40
    names = [f"#/$defs/d{index}" for index in range(many)]
    properties = {f"p{place}": {"$ref": names[place]} for place in range(many)}
    node = {"type": "object", "properties": properties, "additionalProperties": False}
    schema = {"$defs": {f"d{index}": node for index in range(many)}, "$ref": names[0]}
    grammar = bounded(of_schema(schema))
    assert len(str(grammar).splitlines()) < 20_000
    automaton = compiled(grammar)
    assert allows(automaton, '{"p0": ' * 4 + "{}" + "}" * 4)
    assert not allows(automaton, '{"p1": ' * (LEVELS + 2) + "{}" + "}" * (LEVELS + 2))


def test_definitions_may_be_called_as_levels_are() -> None:
    lists = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    flags = {"type": "object", "properties": {"x": {"type": "boolean"}, "y": {"type": "boolean"}}}
    properties = {"p": {"$ref": "#/$defs/a"}, "q": {"$ref": "#/$defs/a_level"}}
    automaton = compiled(bounded(of_schema({"$defs": {"a": lists, "a_level": flags}, "properties": properties})))
    assert allows(automaton, '{"p": [[[]]], "q": {"x": true, "y": false}}')
    assert not allows(automaton, '{"p": [{"x": true}]}')


@pytest.mark.parametrize(
    "schema",
    [
        described("next", {"$ref": "#"}, True),
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"anyOf": [described("a", {"$ref": "#"}, True), described("b", {"$ref": "#"}, True)]},
    ],
)
def test_a_schema_without_an_end_is_refused(schema: Any) -> None:
    with pytest.raises(BadGrammar, match="allows no answer that ends"):
        bounded(of_schema(schema))
    tag = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": schema}, "end": "!"}
    tags = {"type": "triggered_tags", "triggers": ["<a>"], "tags": [tag]}
    with pytest.raises(BadGrammar, match="allows no answer that ends"):
        bounded(xgrammar().Grammar.from_structural_tag(json.dumps({"type": "structural_tag", "format": tags})))


def test_tags_hold_what_has_an_end() -> None:
    content = {"type": "json_schema", "json_schema": RECURSIVE["lists"]}
    number = {"type": "json_schema", "json_schema": {"type": "number"}}
    tags = [
        {"type": "tag", "begin": f"<{name}>", "content": each, "end": "!"}
        for name, each in (("l", content), ("n", number))
    ]
    tag = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<l>", "<n>"], "tags": tags}}
    automaton = compiled(bounded(xgrammar().Grammar.from_structural_tag(json.dumps(tag))))
    lists = "[" * (LEVELS + 1) + "]" * (LEVELS + 1)
    assert allows(automaton, f"12345678901234567890 <l>{lists}! and <n>{'1' * 17}!" * 5)
    assert not allows(automaton, f"<l>[{lists}]!")
    assert not allows(automaton, f"<n>{'1' * 18}!")
