"""Where each key of a TOML text stands. `tomllib` checks the text but keeps no positions."""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str, ...]
"""A dotted key, part by part."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # multi-line strings may end in up to two quotes of their own
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\n]*")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, at which each table and key of a valid TOML text is first written, by its path.

    Tables that are only implied (`a` in `[a.b]`) have the line of what implies them. Tables of an array `[[a]]` are
    `a.0`, `a.1` and so on.
    """
    return _Scanner(text).scan()


class _Scanner:
    """Walks over a text that `tomllib` has accepted, so it checks nothing."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.counts: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self._skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                brackets = 2 if self.text.startswith("[[", self.at) else 1
                self.at += brackets
                line = self.text.count("\n", 0, self.at) + 1
                table = self._key(())
                self.at += brackets
                if brackets == 2:
                    count = self.counts[table] = self.counts.get(table, -1) + 1
                    table = (*table, str(count))
                    self.lines[table] = line
            else:
                self._pair(table)
        return self.lines

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.at

    def _pair(self, table: KeyPath) -> None:
        path = self._key(table)
        self.at += 1  # the equals sign
        self._value(path)

    def _key(self, table: KeyPath) -> KeyPath:
        """Reads a dotted key up to what follows it and notes the line of each of its parts."""
        path = table
        while True:
            self._skip(_SPACE)
            line = self.text.count("\n", 0, self.at) + 1
            start = self.at
            if self.text[start] in "\"'":
                self._skip(_STRING)
                part = str(tomllib.loads("v = " + self.text[start : self.at])["v"])
            else:
                self._skip(_BARE_KEY)
                part = self.text[start : self.at]
            path = (*path, part)
            self.lines.setdefault(path, line)
            self._skip(_SPACE)
            if self.text[self.at] != ".":
                return path
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip(_SPACE)
        opening = self.text[self.at]
        if opening in "\"'":
            self._skip(_STRING)
        elif opening in "[{":
            self.at += 1
            self._skip(_BLANK)
            while self.text[self.at] not in "]}":
                if opening == "{":
                    self._pair(path)
                else:
                    self._value(path)
                self._skip(_BLANK)
                if self.text[self.at] == ",":
                    self.at += 1
                    self._skip(_BLANK)
            self.at += 1
        else:
            self._skip(_SCALAR)
