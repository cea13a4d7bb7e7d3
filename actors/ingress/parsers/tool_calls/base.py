"""What the parsers of tool calls have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from actors.ingress.parsers.events import CallArguments, CallStart
from actors.ingress.parsers.json_text import is_json, quoted, string_value
from actors.ingress.parsers.reader import Reader, Steps
from actors.ingress.parsers.tool_calls.values import parameter_types, value_json

Tools = Mapping[str, Any]
"""JSON schemas of the parameters of the tools that may be called, by their names."""


class ToolCallParser(Reader):
    """Text with tool calls in it, each of which begins with a marker.

    Arguments are given out as they come. What is not in the format is content, and so is a call of a tool that there
    is not. If a call that has begun breaks off, its arguments end there, and what follows is content: they are whole
    JSON only if the call is whole. White space between content and calls is markup.

    Args:
        tools: what may be called.
    """

    MARKERS: ClassVar[tuple[str, ...]]

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._calls = 0
        self._nothing_since_call = False
        super().__init__()

    def parse(self) -> Steps[None]:
        while (marker := (yield from self.give_until(self.MARKERS, self.content))) is not None:
            if not (yield from self.read_calls(marker)) and not self._text[self._mark : self._at].isspace():
                self.give_back()
            self.rewind()
        if not self._nothing_since_call:
            self.give_back()

    @abstractmethod
    def read_calls(self, marker: str) -> Steps[bool]:
        """Reads what follows a marker. False if it is not in the format from the mark on."""

    def content(self, text: str) -> None:
        self._nothing_since_call = False
        super().content(text)

    def start(self, name: str, identity: str = "", markup: int | None = None) -> None:
        """A call begins; what has been read of it is markup, or only so many characters from the mark on."""
        self.emit(CallStart(self._calls, name, identity))
        self._calls += 1
        self._nothing_since_call = True
        self._mark = self._at if markup is None else self._mark + markup

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        self.emit(CallArguments(self._calls - 1, text))

    # -- calls in JSON ----------------------------------------------------------------------------------------------

    def json_call(self, bare: bool = False) -> Steps[bool]:
        """Reads a call such as {"name": "f", "arguments": {}}, whose keys may come in any order.

        Args:
            bare: nothing else tells the call from an answer in JSON, so the arguments must be there.
        """
        if not (yield from self.accept("{")):
            return False
        name: str | None = None
        held: str | None = None
        started = False
        while True:
            yield from self.space()
            if (yield from self.peek()) != '"':
                return False
            key = string_value((yield from self.json()) or "")
            yield from self.space()
            if key is None or not (yield from self.accept(":")):
                return False
            yield from self.space()
            if key == "name" and name is None:
                name = string_value((yield from self.json()) or "")
                if name is None or name not in self._tools:
                    return False
            elif key in ("arguments", "parameters") and held is None and not started:
                if name is not None and (yield from self.peek()) == "{":
                    self.start(name)
                    started = True
                    if not (yield from self.give_json(self.arguments)):
                        return False
                else:
                    held = yield from self._held_arguments()
                    if held is None:
                        return False
            elif not (yield from self._skip_value()):
                return False
            if name is not None and held is not None and not started:
                self.start(name)
                started = True
                self.arguments(held)
            yield from self.space()
            if (yield from self.accept("}")):
                break
            if not (yield from self.accept(",")):
                return False
        if name is None or (bare and not started):
            return False
        if not started:
            self.start(name)
            self.arguments("{}")
        self.drop()
        return True

    def _held_arguments(self) -> Steps[str | None]:
        """Reads arguments: an object, a string that holds the JSON of one, or null for none."""
        first = yield from self.peek()
        if first == "n":
            return "{}" if (yield from self.accept("null")) else None
        text = (yield from self.json()) if first in ("{", '"') else None
        if text is None or text.startswith("{"):
            return text
        inner = (string_value(text) or "").strip()
        if not inner:
            return "{}"
        return inner if inner.startswith("{") and is_json(inner) else None

    def _skip_value(self) -> Steps[bool]:
        if (yield from self.peek()) in '{["':
            return (yield from self.json()) is not None
        return bool((yield from self.word("+-.")))

    # -- calls whose parameters are written one by one ----------------------------------------------------------------

    def parameter(self, name: str, key: str, first: bool, end: str, *, newlines: bool = False) -> Steps[bool]:
        """Reads the value of a parameter, up to a literal and over it, and gives it out as a member of the object.

        A string is given out as it comes, other values when they are whole.

        Args:
            name, key: of the tool and of the parameter.
            first: of the call.
            newlines: a line break at the beginning and one at the end of the value are markup.
        """
        types = parameter_types(self._tools[name], key)
        if types == {"string"}:
            return (yield from self.string_parameter(key, first, end, newlines=newlines))
        text = yield from self.until(end)
        if text is None:
            return False
        if newlines:
            text = text.removeprefix("\n").removesuffix("\n")
        self.member(key, first, value_json(text, types))
        self.drop()
        return True

    def string_parameter(self, key: str, first: bool, end: str, *, newlines: bool = False) -> Steps[bool]:
        """The same for a parameter that is a string whatever its schema says."""
        if newlines:
            yield from self.accept("\n")
        self.drop()
        self.member(key, first, '"')
        found = yield from self.give_until(
            (end,), lambda text: self.arguments(quoted(text)[1:-1]), _without_newline if newlines else str
        )
        if found is None:
            if self._mark < len(self._text):
                self.arguments(quoted(self._text[self._mark :])[1:-1])
            self.drop()
            return False
        self.arguments('"')
        self.drop()
        return True

    def member(self, key: str, first: bool, value: str) -> None:
        """Gives a member of the arguments out."""
        self.arguments(f"{'{' if first else ', '}{quoted(key)}: {value}")

    def end_members(self, none: bool) -> None:
        """Ends the arguments, of which there may be none."""
        self.arguments("{}" if none else "}")
        self.drop()


def _without_newline(text: str) -> str:
    return text.removesuffix("\n")
