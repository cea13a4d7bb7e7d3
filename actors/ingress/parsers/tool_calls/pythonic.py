"""Llama 3.2 and 4, ToolACE, OLMo and others: calls as Python writes them."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser
from actors.ingress.parsers.tool_calls.python_literal import MAX_CHARACTERS, MAX_DEPTH, keywords_of_call

_PAIRS = {"(": ")", "[": "]", "{": "}"}


class PythonicCalls(ToolCallParser):
    """[f(k="v"), g()], a list of calls with named literals. A call is given out when it is whole."""

    MARKERS = ("<|python_start|>", "[")

    def read_calls(self, marker: str) -> Steps[bool]:
        framed = marker != "["
        if framed:
            yield from self.space()
            if not (yield from self.accept("[")):
                return False
        while True:
            yield from self.space()
            if not (yield from self._call()):
                return False
            yield from self.space()
            comma = yield from self.accept(",")
            yield from self.space()
            if (yield from self.accept("]")):
                break
            if not comma:
                return False
            self.drop()
        self.drop()
        if framed:
            yield from self.space()
            if (yield from self.accept("<|python_end|>")):
                self.drop()
        return True

    def _call(self) -> Steps[bool]:
        start = self.read
        name = yield from self.word("_.")
        if name not in self._tools or (yield from self.peek()) != "(":
            return False
        arguments_start = self.read
        if not (yield from self._brackets()):
            return False
        text = "f" + self._text[self._mark + arguments_start : self._at]
        arguments = keywords_of_call(text)
        if arguments is None:
            self._at = self._mark + start
            return False
        self.start(name)
        self.arguments(arguments)
        return True

    def _brackets(self) -> Steps[bool]:
        """Reads from a bracket to the one that closes it."""
        open_: list[str] = []
        start = self.read
        while self.read - start < MAX_CHARACTERS and len(open_) <= MAX_DEPTH:
            character = yield from self.peek()
            if character in ("", "#"):
                return False
            if character in "\"'":
                if not (yield from self._string(character)):
                    return False
                continue
            self._at += 1
            if character in _PAIRS:
                open_.append(_PAIRS[character])
            elif character in ")]}":
                if open_.pop() != character:
                    return False
                if not open_:
                    return True
        return False

    def _string(self, quote: str) -> Steps[bool]:
        triple = yield from self.accept(quote * 3)
        end = quote * 3 if triple else quote
        if not triple:
            self._at += 1
        while not (yield from self.accept(end)):
            character = yield from self.peek()
            if character == "" or (character == "\n" and not triple):
                return False
            self._at += 1
            if character == "\\":
                if not (yield from self.peek()):
                    return False
                self._at += 1
        return True
