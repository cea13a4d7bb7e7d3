"""Structural tags, in the forms of xgrammar, SGLang and vLLM, as llguidance's grammars.

A format becomes rules. Free text that ends with one of several strings is a lexeme that takes as little as it can.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llm_runtime.actors.grammar.backends.json_schema import prepared
from llm_runtime.actors.grammar.backends.lark import HEAD, json_grammar, regex_grammar
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.grammar.examples import MAX_EXAMPLES, string_ends

MAX_FORMATS = 2048
_ANY = r"(?s:.*)"


def structural_tag(tag: Any) -> tuple[str, Sequence[bytes]]:
    """The grammar of a structural tag, and the texts that end its parts. Raises BadGrammar."""
    if not isinstance(tag, dict):
        raise BadGrammar("The structural tag must be a JSON object.")
    if "structures" in tag:
        structures = tag["structures"]
        if not isinstance(structures, list) or not all(isinstance(each, dict) for each in structures):
            raise BadGrammar("The structural tag's 'structures' must be a list of objects.")
        tags = [
            {
                "begin": each["begin"],
                "content": {"type": "json_schema", "json_schema": each.get("schema", True)},
                "end": each["end"],
            }
            for each in structures
        ]
        form: Any = {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}
    else:
        form = tag.get("format")
    rules = _Rules()
    start = rules.format(form)
    return f"{HEAD}start: {start}\n" + "\n".join(rules.lines) + "\n", rules.endings + rules.string_ends


class _Rules:
    """The rules that are made.

    Attributes:
        lines: of Lark.
        endings: texts that end a tag. string_ends: of strings in JSON.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.endings: list[bytes] = []
        self.string_ends: list[bytes] = []

    def format(self, form: Any) -> str:
        """An expression of a format."""
        kind = form.get("type") if isinstance(form, dict) else None
        match kind:
            case "const_string":
                return _literal(_text(form, "value"))
            case "json_schema":
                return self._json(form)
            case "regex":
                return regex_grammar(_text(form, "pattern"))
            case "any_text":
                _plain(form, "excludes", "max_tokens", "max_chars")
                return self._rule(f"/{_ANY}/")
            case "sequence":
                return self._rule(" ".join(self.format(each) for each in _list(form, "elements")))
            case "or":
                return self._either([self.format(each) for each in _list(form, "elements")])
            case "tag":
                return self._rule(_literal(_text(form, "begin"), or_empty=True) + " " + self._rest(form))
            case "triggered_tags":
                return self._triggered(form)
            case "tags_with_separator":
                return self._separated(form)
            case "optional" | "star" | "plus":
                mark = {"optional": "?", "star": "*", "plus": "+"}[kind]
                return f"({self._rule(self.format(form.get('content')))}){mark}"
            case "repeat":
                least, most = form.get("min"), form.get("max")
                if type(least) is not int or type(most) is not int or not 0 <= least <= max(most, 0):
                    raise BadGrammar("The structural tag's 'repeat' needs 'min' and 'max', the first one not larger.")
                return f"({self._rule(self.format(form.get('content')))}){{{least},{most}}}"
            case str():
                raise BadGrammar(
                    f"The structural tag's format '{kind}' is not supported by llguidance: "
                    'set grammar_backend = "xgrammar", or use another format.'
                )
            case _:
                raise BadGrammar("The structural tag has a format without a 'type'.")

    def _rule(self, body: str, options: str = "") -> str:
        if len(self.lines) >= MAX_FORMATS:
            raise BadGrammar(f"The structural tag has more than {MAX_FORMATS} formats.")
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def _either(self, options: list[str]) -> str:
        return self._rule(" | ".join(options))

    def _json(self, form: dict[str, Any]) -> str:
        _plain(form, "any_order", "excludes")
        if form.get("style", "json") != "json":
            raise BadGrammar(
                f"The structural tag's style '{form['style']}' is not supported by llguidance: "
                'set grammar_backend = "xgrammar", or use "json".'
            )
        schema = prepared(form["json_schema"])
        self.string_ends = list(dict.fromkeys([*self.string_ends, *string_ends(schema)]))[:MAX_EXAMPLES]
        blanks = form.get("max_whitespace_cnt")
        if blanks is None:
            return json_grammar(schema)
        if type(blanks) is not int or blanks < 0:
            raise BadGrammar("The structural tag's 'max_whitespace_cnt' must be an integer that is not negative.")
        return json_grammar(schema, blanks)

    def _rest(self, tag: dict[str, Any]) -> str:
        """A tag behind its beginning."""
        end = tag.get("end")
        given = end if isinstance(end, list) else [end]
        ends = [each for each in given if isinstance(each, str)]
        if not ends or len(ends) < len(given):
            raise BadGrammar("The structural tag's 'end' must be a string, or a list of strings.")
        self.endings += [each.encode() for each in ends if each]
        content = tag.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            _plain(content, "excludes", "max_tokens", "max_chars")
            return self._until(ends)
        return f"{self.format(content)} {self._either([_literal(each, or_empty=True) for each in ends])}"

    def _until(self, ends: Sequence[str]) -> str:
        """Any text up to the first of these, with it."""
        return self._rule(f"/{_ANY}({'|'.join(_escaped(each) for each in ends)})/", "[lazy]")

    def _triggered(self, form: dict[str, Any]) -> str:
        _plain(form, "excludes")
        triggers, tags = form.get("triggers"), _list(form, "tags")
        if (
            not isinstance(triggers, list)
            or not triggers
            or not all(isinstance(each, str) and each for each in triggers)
        ):
            raise BadGrammar("The structural tag's 'triggers' must be a list of strings that are not empty.")
        by_trigger: dict[str, list[str]] = {}
        whole: list[str] = []
        for tag in tags:
            if not isinstance(tag, dict):
                raise BadGrammar("The structural tag's 'tags' must be a list of objects.")
            begin = _text(tag, "begin")
            trigger = next((each for each in triggers if begin.startswith(each)), None)
            if trigger is None:
                raise BadGrammar(f"The structural tag begins with {begin!r}, and no trigger does.")
            rest = self._rule(self._rest(tag))
            by_trigger.setdefault(trigger, []).append(f"{_literal(begin[len(trigger) :], or_empty=True)} {rest}")
            whole.append(f"{_literal(begin)} {rest}")
        after = [f"{self._until([trigger])} ({' | '.join(rests)})" for trigger, rests in by_trigger.items()]
        later, first = self._either(after), self._either(whole)
        must, once = form.get("at_least_one", False), form.get("stop_after_first", False)
        text = self._rule(f"/{_ANY}/")
        if once:
            return first if must else self._either([later, text])
        return self._rule(f"{first} {later}* {text}" if must else f"{later}* {text}")

    def _separated(self, form: dict[str, Any]) -> str:
        one = self._either(
            [self.format({**tag, "type": "tag"}) for tag in _list(form, "tags") if isinstance(tag, dict)]
        )
        separator = _literal(_text(form, "separator"), or_empty=True)
        many = one if form.get("stop_after_first", False) else f"{one} ({separator} {one})*"
        return self._rule(many if form.get("at_least_one", False) else f"({many})?")


def _text(form: dict[str, Any], name: str) -> str:
    value = form.get(name)
    if not isinstance(value, str):
        raise BadGrammar(f"The structural tag's '{name}' must be a string.")
    return value


def _list(form: dict[str, Any], name: str) -> list[Any]:
    value = form.get(name)
    if not isinstance(value, list) or not value:
        raise BadGrammar(f"The structural tag's '{name}' must be a list that is not empty.")
    return value


def _plain(form: dict[str, Any], *names: str) -> None:
    """Refuses options that would not be kept."""
    for name in names:
        if form.get(name) not in (None, False, []):
            raise BadGrammar(
                f"The structural tag's '{name}' is not supported by llguidance: "
                'leave it out, or set grammar_backend = "xgrammar".'
            )


def _literal(text: str, or_empty: bool = False) -> str:
    """An expression of a text."""
    if not text and not or_empty:
        raise BadGrammar("The structural tag has an empty string where it must not.")
    return json.dumps(text, ensure_ascii=False) if text else '""'


def _escaped(text: str) -> str:
    """A text in a regular expression between slashes."""
    return "".join(each if each.isascii() and each.isalnum() else f"\\x{{{ord(each):x}}}" for each in text)
