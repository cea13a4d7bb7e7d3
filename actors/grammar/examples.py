"""Short texts that regular expressions match, as hints for the search of an answer's end: every one is tried there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_EXAMPLES = 32
MAX_LENGTH = 256
_KINDS = {"d": "0", "w": "a", "s": " ", "D": "a", "W": "-", "S": "a", "b": "", "B": "", "A": "", "z": "", "Z": ""}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_TRIED = "a0A-_ ./:" + "".join(map(chr, range(33, 127))) + "é中"
_CLASS = re.compile(r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\\\]])*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?::|P?<\w+>|[a-z]+:))?")
_CODE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]{1,6})\})")
_COUNT = re.compile(r"(?:\*|\+|\?|\{([0-9]*)(?:,[0-9]*)?\})[?+]?")


def examples(pattern: str) -> list[str]:
    """Texts that a regular expression may match, one for each of its alternatives, the shortest first."""
    try:
        reader = _Reader(pattern)
        found = reader.alternatives()
    except (ValueError, IndexError, RecursionError, re.error):
        return []
    return sorted({each for each in found if len(each) <= MAX_LENGTH}, key=lambda each: (len(each), each))


def string_ends(schema: Any) -> list[bytes]:
    """Texts with which strings of a JSON schema may end, with their quotes."""
    found: dict[bytes, None] = {}
    for pattern in _patterns(schema):
        for example in examples(pattern):
            found[json.dumps(example, ensure_ascii=False)[1:].encode("utf-8", "replace")] = None
        if len(found) >= MAX_EXAMPLES:
            break
    return list(found)[:MAX_EXAMPLES]


def _patterns(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        place = waiting.pop()
        if isinstance(place, dict):
            if isinstance(place.get("pattern"), str):
                yield place["pattern"]
            if isinstance(place.get("patternProperties"), dict):
                yield from place["patternProperties"]
        if isinstance(place, dict | list):
            waiting += place.values() if isinstance(place, dict) else place


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def alternatives(self) -> list[str]:
        found = [self._sequence()]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            found.append(self._sequence())
        return found

    def _sequence(self) -> str:
        text = ""
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            piece = self._piece()
            count = _COUNT.match(self._pattern, self._at)
            if count is not None:
                self._at = count.end()
                times = 1 if count[0].startswith("+") else int(count[1] or 0)
                piece = piece * times if len(piece) * times <= MAX_LENGTH else piece
            text += piece
            if len(text) > MAX_LENGTH:
                raise ValueError("too long")
        return text

    def _piece(self) -> str:
        character = self._pattern[self._at]
        if character == "(":
            return self._group()
        if character == "[":
            match = _CLASS.match(self._pattern, self._at)
            if match is None:
                raise ValueError("a class without an end")
            self._at = match.end()
            inside = re.sub(
                r"(\\.)|[\[&|~]|(?<=-)-", lambda each: each[1] or f"\\{each[0]}", match[0][1:], flags=re.DOTALL
            )
            kind = re.compile(f"[{inside}")
            return next((each for each in _TRIED if kind.fullmatch(each)), "")
        if character == "\\":
            return self._escape()
        self._at += 1
        return {"^": "", "$": "", ".": "a"}.get(character, character)

    def _group(self) -> str:
        match = _GROUP.match(self._pattern, self._at)
        assert match is not None
        self._at = match.end()
        if self._pattern.startswith("?", self._at):
            raise ValueError("an assertion")
        found = min(self.alternatives(), key=len)
        if not self._pattern.startswith(")", self._at):
            raise ValueError("a group without an end")
        self._at += 1
        return found

    def _escape(self) -> str:
        code = _CODE.match(self._pattern, self._at)
        if code is not None:
            self._at = code.end()
            return chr(int(code[1] or code[2] or code[3], 16))
        kind = self._pattern[self._at + 1]
        self._at += 2
        if kind in "pP":
            self._at = (
                self._pattern.index("}", self._at) + 1 if self._pattern.startswith("{", self._at) else self._at + 1
            )
            return "a"
        return {**_KINDS, **_CONTROLS}.get(kind, kind)
