"""Llama 3.2 and 4, ToolACE and others: calls as Python writes them."""

from __future__ import annotations

from typing import ClassVar

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.parsers.tool_calls.python_literal import MAX_CHARACTERS, MAX_DEPTH, keywords_of_call
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS

_PAIRS = {"(": ")", "[": "]", "{": "}"}


class PythonCalls(ToolCallParser):
    """f(k="v"), calls with literals as arguments, in a list or one behind the other.

    A call is given out when it is whole. What stands beside calls in a list and is none is dropped.
    """

    FRAMES: ClassVar[tuple[str, ...]] = ()
    """Markers behind which calls come, not the list itself."""

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker not in self.FRAMES:
            return (yield from self.python_list())
        yield from self.space()
        if (yield from self.accept("[")):
            found = yield from self.python_list()
        else:
            found = yield from self.python_lines()
        if not found:
            return False
        yield from self.end()
        return True

    def python_list(self) -> Steps[bool]:
        """Reads a list from behind its bracket. False if there is no call in it."""
        calls = self._calls
        while True:
            yield from self.space()
            if (yield from self.accept("]")):
                break
            if not (yield from self.python_call(calls < self._calls)):
                return False
            yield from self.space()
            if not (yield from self.accept(",")) and (yield from self.peek()) != "]":
                return False
            if self._calls > calls:
                self.drop()
        if self._calls == calls:
            return False
        self.drop()
        return True

    def python_lines(self) -> Steps[bool]:
        """Reads calls that follow each other. False if the first is none."""
        calls = self._calls
        while True:
            place = self.read
            if not (yield from self.python_call(False)) or self._calls == calls:
                self.rewind(place)
                return self._calls > calls
            calls = self._calls
            yield from self.space()
            yield from self.accept(",", ";")
            yield from self.space()
            if not (yield from self.peek()).isidentifier():
                return True

    def python_call(self, drop: bool) -> Steps[bool]:
        """Reads a call, and gives it out if there is such a tool and its arguments are literals. False if it is none.

        Args:
            drop: one that is not given out is dropped.
        """
        name = yield from self.word("_.-")
        if not name or (yield from self.peek()) != "(":
            return False
        start = self.read
        if not (yield from self._brackets()):
            return False
        arguments = keywords_of_call("f" + self.held()[start:], self._tools[name]) if name in self._tools else None
        if arguments is not None:
            self.start(name)
            self.arguments(arguments)
        elif drop:
            self.drop()
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
        end = triple or quote
        if not triple:
            self._at += 1
        start = self.read
        while not (yield from self.accept(end)):
            character = yield from self.peek()
            if character == "" or self.read - start > MAX_CHARACTERS:
                return False
            self._at += 1
            if character == "\\":
                if not (yield from self.peek()):
                    return False
                self._at += 1
        return True


@FORMATS.register(
    "pythonic",
    "llama4_pythonic",
    template=lambda template: "<|python_start|>" in template or "[func_name1(params_name1=params_value1" in template,
)
class PythonicCalls(PythonCalls):
    """[f(k="v"), g()], which may stand between `<|python_start|>` and `<|python_end|>`."""

    MARKERS = ("<|python_start|>", "[")
    ENDS = ("<|python_end|>",)
    FRAMES = ("<|python_start|>",)


@FORMATS.register("olmo3", template=lambda template: "<function_calls>" in template and "<functions>" in template)
class OLMoCalls(PythonCalls):
    """`<function_calls>`, calls in lines of their own, and `</function_calls>`."""

    MARKERS = ("<function_calls>",)
    ENDS = ("</function_calls>",)
    FRAMES = MARKERS
