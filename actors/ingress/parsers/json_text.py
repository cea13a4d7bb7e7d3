"""JSON (RFC 8259) in text that arrives in pieces: where a value ends, and whether it is one."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

MAX_DEPTH = 128

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_VALUE = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_SPACE = " \t\n\r"
_HEX = "0123456789abcdefABCDEF"


class JsonScanner:
    """Accepts one JSON value, character by character.

    Attributes:
        done: the value has ended; only objects, arrays and strings end by themselves.
        failed: the next character cannot be part of a value.
    """

    __slots__ = ("_escape", "_expect", "_in_string", "_in_word", "_open", "_word", "done", "failed")

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []
        self._expect = "value"
        self._in_string = False
        self._escape = 0  # characters of an escape that are still to come, -1 right after the backslash
        self._in_word = False
        self._word = ""

    def scan(self, text: str, at: int) -> int:
        """Where the value ends, or what cannot be part of it begins, or the text ends."""
        size = len(text)
        while at < size and not self.done and not self.failed:
            if self._in_string:
                at = self._string(text, at)
            elif self._in_word:
                at = self._go_on_with_word(text, at)
            else:
                at = self._structure(text, at)
        return at

    def end(self) -> bool:
        """No more text comes: whether that was a whole value."""
        if self._in_word:
            self._end_word()
            self.done = self.done or (not self.failed and not self._open)
        return self.done

    def _string(self, text: str, at: int) -> int:
        if self._escape:
            character = text[at]
            if self._escape < 0:
                self._escape = 4 if character == "u" else 0
                self.failed = character not in '"\\/bfnrtu'
            else:
                self._escape -= 1
                self.failed = character not in _HEX
            return at if self.failed else at + 1
        match = _PLAIN.match(text, at)
        assert match is not None
        at = match.end()
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escape = -1
        elif text[at] == '"':
            self._in_string = False
            if self._expect == "colon":
                return at + 1
            self._value_ended()
        else:
            self.failed = True
            return at
        return at + 1

    def _go_on_with_word(self, text: str, at: int) -> int:
        match = _WORD.match(text, at)
        assert match is not None
        self._word += match.group()
        at = match.end()
        if at < len(text):
            self._end_word()
        return at

    def _end_word(self) -> None:
        self._in_word = False
        if _VALUE.fullmatch(self._word):
            self._value_ended()
        else:
            self.failed = True
        self._word = ""

    def _value_ended(self) -> None:
        self._expect = "comma"
        self.done = not self._open

    def _structure(self, text: str, at: int) -> int:
        character = text[at]
        if character in _SPACE and self._open:
            return at + 1
        expect = self._expect
        if expect in ("key", "first key"):
            if character == '"':
                self._in_string, self._expect = True, "colon"
                return at + 1
            if character == "}" and expect == "first key":
                self._close()
                return at + 1
        elif expect == "colon":
            if character == ":":
                self._expect = "value"
                return at + 1
        elif expect == "comma":
            closing = "}" if self._open[-1] == "{" else "]"
            if character == ",":
                self._expect = "key" if self._open[-1] == "{" else "value"
                return at + 1
            if character == closing:
                self._close()
                return at + 1
        elif character in "{[" and len(self._open) < MAX_DEPTH:
            self._open.append(character)
            self._expect = "first key" if character == "{" else "first value"
            return at + 1
        elif character == '"':
            self._in_string = True
            return at + 1
        elif character == "]" and expect == "first value":
            self._close()
            return at + 1
        elif character in "-0123456789tfn":
            self._in_word = True
            return at
        self.failed = True
        return at

    def _close(self) -> None:
        self._open.pop()
        self._value_ended()


def is_json(text: str) -> bool:
    """Whether a text is one JSON value with nothing around it."""
    scanner = JsonScanner()
    return scanner.scan(text, 0) == len(text) and scanner.end()


def string_value(text: str) -> str | None:
    """What a JSON string stands for; None for other values. The text must be JSON."""
    if not text.startswith('"'):
        return None
    value = json.loads(text)
    assert isinstance(value, str)
    return value.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def object_of(text: str) -> dict[str, Any]:
    """A call's arguments; empty if the output has ended before they were an object."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}
