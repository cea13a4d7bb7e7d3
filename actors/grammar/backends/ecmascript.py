"""Patterns of JSON Schema, which are ECMAScript's regular expressions, in the library's syntax, which is Rust's.

Most of both is the same. Where a text means something else there, or nothing, it is written as both understand it.
"""

from __future__ import annotations

import re

_COUNT = re.compile(r"\{[0-9]+(?:,[0-9]*)?\}")
_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_CODE = re.compile(r"\\(?:[uxpP]\{[^}]*\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})")
_CONTROL = re.compile(r"\\c([A-Za-z])")
_NUL = re.compile(r"\\0(?![0-9])")
_SETS = "dDsSwWpP"
_OPERATORS = "[&~-"
"""In a class they are characters, and sometimes operators in Rust."""


def library_pattern(pattern: str) -> str:
    """The pattern as the library reads it. It stays the same if it is read again."""
    return _Reader(pattern).read()


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def read(self) -> str:
        parts: list[str] = []
        while self._at < len(self._pattern):
            character = self._pattern[self._at]
            if character == "[":
                parts.append(self._class())
            elif character == "{":
                parts.append(self._brace())
            else:
                parts.append(self._one(in_class=False))
        return "".join(parts)

    def _brace(self) -> str:
        """A count, else the character."""
        count = _COUNT.match(self._pattern, self._at)
        self._at += 1 if count is None else len(count[0])
        return "\\{" if count is None else count[0]

    def _class(self) -> str:
        begin, pattern = self._at, self._pattern
        negated = pattern.startswith("[^", begin)
        self._at += 2 if negated else 1
        parts: list[str] = []
        while self._at < len(pattern) and pattern[self._at] != "]":
            first = self._one(in_class=True)
            parts.append(first)
            if pattern.startswith("-", self._at) and not pattern.startswith("-]", self._at):
                self._at += 1
                if self._at == len(pattern):
                    break
                last = self._one(in_class=True)
                parts += ["\\-" if _is_set(first) or _is_set(last) else "-", last]
        if self._at >= len(pattern):
            self._at = len(pattern)
            return pattern[begin:]  # has no end: the library says so
        self._at += 1
        if not parts:
            return r"[\s\S]" if negated else r"[^\s\S]"
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def _one(self, in_class: bool) -> str:
        """A character, an escaped one, or a named set of them."""
        pattern, at = self._pattern, self._at
        if pattern[at] != "\\":
            self._at += 1
            return f"\\{pattern[at]}" if in_class and pattern[at] in _OPERATORS else pattern[at]
        pair = _PAIR.match(pattern, at)
        if pair is not None:
            self._at = pair.end()
            return bytes.fromhex(pair[1] + pair[2]).decode("utf-16-be")
        code = _CODE.match(pattern, at)
        if code is not None:
            self._at = code.end()
            return code[0]
        control = _CONTROL.match(pattern, at)
        if control is not None:
            self._at = control.end()
            return f"\\x{ord(control[1]) & 31:02x}"
        if _NUL.match(pattern, at) is not None:
            self._at += 2
            return r"\x00"
        escaped = pattern[at : at + 2]
        self._at += 2
        if in_class and escaped == r"\b":
            return r"\x08"
        return escaped[1] if escaped in (r"\<", r"\>") else escaped  # Rust's ends of words


def _is_set(text: str) -> bool:
    return text[:1] == "\\" and text[1:2] in _SETS
