"""Calls that are objects in JSON, alone or in lists."""

from __future__ import annotations

from typing import ClassVar

from actors.parsers.json_text import repaired, string_value
from actors.parsers.reader import Steps
from actors.parsers.tool_calls.base import ToolCallParser

_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters", "args")


class JSONCalls(ToolCallParser):
    """A marker, then {"name": "f", "arguments": {…}}, several of them, or a list of them, then what ends that.

    The keys may come in any order. What stands beside calls in a list and is none is dropped.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = (",", ";")

    def read_calls(self, marker: str) -> Steps[bool]:
        if not marker.endswith("["):
            yield from self.space()
            if (yield from self.peek()) == "{":
                return (yield from self._objects())
            if not (yield from self.accept("[")):
                return False
        if not (yield from self.read_list()):
            return False
        yield from self.end()
        return True

    def read_list(self) -> Steps[bool]:
        """Reads a list from behind its bracket. False if there is no call in it, or it is broken."""
        calls = self._calls
        while True:
            yield from self.space()
            if (yield from self.accept("]")):
                if self._calls > calls:
                    self.drop()
                return self._calls > calls
            if (yield from self.accept(",")):
                continue
            before, begun = self.read, self._calls
            if (yield from self.peek()) == "{" and (yield from self.json_call()):
                continue
            if self._calls > begun:
                return False
            self.rewind(before)
            if not (yield from self._skip_value()):
                return False

    def _objects(self) -> Steps[bool]:
        while True:
            if not (yield from self.json_call()):
                return False
            if (yield from self.end()):
                return True
            yield from self.space()
            if (yield from self.accept(*self.SEPARATORS)):
                yield from self.space()
            if (yield from self.peek()) != "{":
                return True

    def json_call(self, bare: bool = False) -> Steps[bool]:
        """Reads one call.

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
            if (yield from self.accept("}")):
                break
            if started and (yield from self._at_end()):
                return True  # the last bracket is missing
            key = yield from self._key()
            yield from self.space()
            if not key or not (yield from self.accept(":")):
                return False
            yield from self.space()
            if key in _NAMES and name is None:
                name = string_value((yield from self.json()) or "")
                if name is None or name not in self._tools:
                    return False
            elif key in _ARGUMENTS and held is None and not started:
                if name is not None and (yield from self.peek()) == "{":
                    self.start(name)
                    started = True
                    if not (yield from self.give_json(self.arguments, self.STOPS)):
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
            yield from self.accept(",")
        if name is None or (bare and not started):
            return False
        if not started:
            self.start(name)
            self.arguments("{}")
        self.drop()
        return True

    def _key(self) -> Steps[str]:
        if (yield from self.peek()) in ('"', "'"):
            return string_value((yield from self.json()) or "") or ""
        return (yield from self.word())

    def _at_end(self) -> Steps[bool]:
        """Whether what ends the calls comes next, or nothing at all."""
        place = self.read
        found = bool((yield from self.accept(*self.STOPS))) or not (yield from self.peek())
        self.rewind(place)
        return found

    def _held_arguments(self) -> Steps[str | None]:
        """Reads arguments: an object, a string that holds the JSON of one, or null for none."""
        first = yield from self.peek()
        if first in ("n", "N"):
            return "{}" if (yield from self.accept("null", "None")) else None
        text = (yield from self.json()) if first in ("{", '"', "'") else None
        if text is None or text.startswith("{"):
            return text
        inner = (string_value(text) or "").strip()
        if not inner:
            return "{}"
        return repaired(inner) if inner.startswith("{") else None

    def _skip_value(self) -> Steps[bool]:
        if (yield from self.peek()) in ("{", "[", '"', "'"):
            return (yield from self.json()) is not None
        return bool((yield from self.word("_+-.")))
