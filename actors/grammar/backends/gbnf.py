"""Grammars in EBNF as llama.cpp (GBNF), SGLang and vLLM write them, as llguidance's grammars.

llguidance divides a text into lexemes, each as long as it can be, and EBNF knows no lexemes. So a grammar whose rules
do not hold themselves becomes one regular expression, and any other one has a lexeme for each character.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_PATTERN = 50_000
"""Characters of a regular expression that a grammar may become."""
MAX_DEPTH = 200

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_BLANKS = re.compile(r"(?:[ \t]|#[^\n]*)*")
_BLANKS_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_RULE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*[ \t]*::=")
_COUNT = re.compile(r"\{\s*(\d+)?\s*(,)?\s*(\d+)?\s*\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "b": "\b", "a": "\a", "0": "\0"}


@dataclass(slots=True)
class Node:
    """A part of a rule.

    Attributes:
        kind: "text" of characters, "class" with a regular expression, "rule" by name, "sequence", "choice", "repeat".
        most: of a repetition; None for any number.
    """

    kind: str
    text: str = ""
    parts: list[Node] = field(default_factory=list)
    least: int = 1
    most: int | None = 1


def lark_of(grammar: str) -> str:
    """A grammar in Lark's syntax. Raises ValueError."""
    rules = _Parser(grammar).rules()
    if "root" not in rules:
        raise ValueError("it has no rule 'root'")
    missing = sorted({name for body in rules.values() for name in _names(body)} - rules.keys())
    if missing:
        raise ValueError(f"the rule '{missing[0]}' is not defined")
    pattern = _pattern(rules)
    if pattern is not None:
        return f"start: /(?:{pattern})/"
    numbers = {name: f"r{number}" for number, name in enumerate(rules)}
    lines = [f"{numbers[name]}: {_expression(body, numbers)}" for name, body in rules.items()]
    return "\n".join([f"start: {numbers['root']}", *lines]) + "\n"


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, Node]:
        """Bodies by name."""
        found: dict[str, Node] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            if not _RULE.match(self._text, self._at):
                raise self._wrong("expected a rule, NAME ::= …")
            name = self._take(_NAME)
            self._at = self._text.index("::=", self._at) + 3
            if name in found:
                raise ValueError(f"the rule '{name}' is defined twice")
            self._skip(lines=True)
            found[name] = self._choice()
            self._skip(lines=True)
        return found

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("it is nested too deep")
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            self._skip(lines=True)
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Node("choice", parts=options)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while True:
            self._skip()
            if self._peek() in "\r\n" and self._peek() and not self._new_rule():
                self._skip(lines=True)
            character = self._peek()
            if not character or character in "|)\r\n" or self._new_rule():
                break
            parts.append(self._repeated(self._primary(character)))
        return parts[0] if len(parts) == 1 else Node("sequence", parts=parts)

    def _new_rule(self) -> bool:
        """Whether a rule begins behind blanks and lines."""
        ahead = _BLANKS_LINES.match(self._text, self._at)
        return ahead is not None and _RULE.match(self._text, ahead.end()) is not None

    def _primary(self, character: str) -> Node:
        if character == '"':
            return self._quoted()
        if character == "[":
            return self._class()
        if character == ".":
            self._at += 1
            return Node("class", r"[^\n]")
        if character == "(":
            self._at += 1
            if self._peek() == "?":
                raise self._wrong("a lookahead is not supported")
            self._skip(lines=True)
            inner = self._choice()
            self._skip(lines=True)
            if self._peek() != ")":
                raise self._wrong("expected ')'")
            self._at += 1
            return inner
        if _NAME.match(self._text, self._at):
            return Node("rule", self._take(_NAME))
        raise self._wrong(f"unexpected {character!r}")

    def _repeated(self, node: Node) -> Node:
        while True:
            character = self._peek()
            if character and character in "*+?":
                self._at += 1
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
            elif character == "{":
                counts = _COUNT.match(self._text, self._at)
                if counts is None or (counts[1] is None and counts[3] is None):
                    raise self._wrong("expected {N}, {N,} or {N,M}")
                self._at = counts.end()
                least = int(counts[1] or 0)
                most = int(counts[3]) if counts[3] else (None if counts[2] else least)
                if most is not None and most < least:
                    raise self._wrong("a repetition's second number is less than its first")
            else:
                return node
            node = Node("repeat", parts=[node], least=least, most=most)

    def _quoted(self) -> Node:
        self._at += 1
        text = ""
        while self._peek() != '"':
            text += self._character("the string is not closed")
        self._at += 1
        return Node("text", text)

    def _class(self) -> Node:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        members = ""
        while self._peek() != "]":
            first = self._character("the class is not closed")
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._character("the class is not closed")
                if last < first:
                    raise self._wrong("a class has a range that goes backwards")
                members += f"{_escaped(first)}-{_escaped(last)}"
            else:
                members += _escaped(first)
        self._at += 1
        if not members:
            return Node("class", r"[\s\S]") if negated else Node("class", r"[^\s\S]")
        return Node("class", f"[{'^' * negated}{members}]")

    def _character(self, otherwise: str) -> str:
        """The next one, of which an escape says the name."""
        character = self._peek()
        if not character or character in "\r\n":
            raise self._wrong(otherwise)
        if character != "\\":
            self._at += 1
            return character
        escape = _ESCAPE.match(self._text, self._at)
        if escape is None:
            raise self._wrong("an escape ends nowhere")
        self._at = escape.end()
        number = escape[1] or escape[2] or escape[3]
        if number is not None:
            if int(number, 16) > 0x10FFFF or 0xD800 <= int(number, 16) < 0xE000:
                raise self._wrong("an escape names no character")
            return chr(int(number, 16))
        return _NAMED.get(escape[4], escape[4])

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, lines: bool = False) -> None:
        blanks = (_BLANKS_LINES if lines else _BLANKS).match(self._text, self._at)
        assert blanks is not None
        self._at = blanks.end()

    def _take(self, what: re.Pattern[str]) -> str:
        found = what.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        return found[0]

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{what}, in line {self._text.count(chr(10), 0, self._at) + 1}")


def _names(node: Node) -> list[str]:
    """The rules that a node refers to."""
    return [node.text] if node.kind == "rule" else [name for part in node.parts for name in _names(part)]


def _pattern(rules: dict[str, Node]) -> str | None:
    """A regular expression of `root`; None if a rule holds itself, or it would be too long."""
    done: dict[str, str] = {}

    def rule(name: str, way: tuple[str, ...]) -> str:
        if name in way or len(way) > MAX_DEPTH:
            raise OverflowError
        if name not in done:
            done[name] = of(rules[name], (*way, name))
            if len(done[name]) > MAX_PATTERN:
                raise OverflowError
        return done[name]

    def of(node: Node, way: tuple[str, ...]) -> str:
        match node.kind:
            case "text":
                return "".join(map(_escaped, node.text))
            case "class":
                return node.text
            case "rule":
                return f"(?:{rule(node.text, way)})"
            case "sequence":
                return "".join(of(part, way) for part in node.parts)
            case "choice":
                return f"(?:{'|'.join(of(part, way) for part in node.parts)})"
            case _:
                most = "" if node.most is None else node.most
                return f"(?:{of(node.parts[0], way)}){{{node.least},{most}}}"

    try:
        return rule("root", ())
    except OverflowError:
        return None


def _expression(node: Node, numbers: dict[str, str]) -> str:
    """A node in Lark's syntax, with a lexeme for each character."""
    inner: Callable[[Node], str] = lambda part: _expression(part, numbers)  # noqa: E731
    match node.kind:
        case "text":
            return " ".join(f"/{_escaped(character)}/" for character in node.text) or '""'
        case "class":
            return f"/{node.text}/"
        case "rule":
            return numbers[node.text]
        case "sequence":
            return " ".join(f"({inner(part)})" for part in node.parts) or '""'
        case "choice":
            return " | ".join(inner(part) for part in node.parts)
        case _:
            most = "" if node.most is None else node.most
            return f"({inner(node.parts[0])}){{{node.least},{most}}}"


def _escaped(character: str) -> str:
    if character.isascii() and character.isalnum():
        return character
    return f"\\x{{{ord(character):x}}}"
