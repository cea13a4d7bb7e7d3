"""Constraints as grammars in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark

from llm_runtime.actors.grammar.backends.gbnf import lark_of
from llm_runtime.actors.grammar.backends.json_schema import prepared
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.grammar.examples import examples, string_ends
from llm_runtime.actors.messages import Constraint

HEAD = '%llguidance {"no_forcing": true}\n'
_LARK = re.compile(r"^\s*(%llguidance\b|start\s*:[^:])", re.MULTILINE)
ONE_LINE: dict[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON has one form, `{"a": 1, "b": [2]}`: where blanks are free, small models draw them for ever."""


def grammar_of(constraint: Constraint) -> tuple[str, Sequence[bytes]]:
    """A constraint as the library reads it, and texts that may end an answer."""
    text = constraint.text
    match constraint.kind:
        case "json":
            return f"{HEAD}start: {json_grammar({'type': 'object'})}", ()
        case "json_schema":
            schema = prepared(json.loads(text))
            return f"{HEAD}start: {json_grammar(schema)}", string_ends(schema)
        case "regex":
            return f"{HEAD}start: {regex_grammar(text)}", [each.encode() for each in examples(text)]
        case "ebnf":
            return HEAD + lark(text), ()
        case "choice":
            return f"{HEAD}start: /{_choice(text)}/", ()
        case _:
            from llm_runtime.actors.grammar.backends.structural_tag import (
                structural_tag,  # it is made of the parts below
            )

            return structural_tag(json.loads(text))


def json_grammar(schema: Any, blanks: int | None = None) -> str:
    """An expression of JSON on one line.

    Args:
        blanks: that may stand between its parts, in place of the usual form.
    """
    if not isinstance(schema, dict):
        schema = {} if schema else {"anyOf": [False]}
    form = ONE_LINE
    if blanks is not None:
        form = {"whitespace_flexible": False}
        if blanks:
            form = {"whitespace_pattern": f"[ \\n\\r\\t]{{1,{blanks}}}"}
    return "%json " + json.dumps({**schema, "x-guidance": form})


def regex_grammar(pattern: str) -> str:
    """An expression that is a regular expression, which the whole text must match."""
    return f"/{regex_to_lark(f'(?:{pattern})', 'd')}/"


def lark(text: str) -> str:
    """A grammar in Lark's syntax from one in EBNF, or in llguidance's own."""
    return text if _LARK.search(text) else lark_of(text)


def _choice(text: str) -> str:
    """A regular expression of the strings of a JSON list."""
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise BadGrammar("The list of choices must be a list of strings that are not empty.")
    return "|".join(_escaped(each) for each in choices)


def _escaped(text: str) -> str:
    return "".join(each if each.isascii() and each.isalnum() else f"\\x{{{ord(each):x}}}" for each in text)
