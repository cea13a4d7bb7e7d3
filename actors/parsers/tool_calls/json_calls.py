"""Calls that are objects in JSON, alone or in lists."""

from __future__ import annotations

from typing import ClassVar

from llm_runtime.actors.parsers.json_text import QUOTES, quoted, repaired, string_value
from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.parsers.tool_calls.values import parameter_kind

_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_FENCES = ("```json", "```")


class JSONCalls(ToolCallParser):
    """A marker, then {"name": "f", "arguments": {…}}, several of them, or a list of them, then what ends that.

    The keys may come in any order. What stands beside calls in a list and is none is dropped.
    """

    SEPARATORS: ClassVar[tuple[str, ...]] = (",", ";")

    def read_calls(self, marker: str) -> Steps[bool]:
        if not marker.endswith("["):
            yield from self.space()
            if (yield from self.accept(*_FENCES)):
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
        if not (yield from self.accept("{{", "{")):  # in templates braces are doubled, and models copy that
            return False
        name: str | None = None
        held: str | None = None
        others: dict[str, str] = {}
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
            if key == "function" and name is None and (yield from self.peek()) == "{":
                return (yield from self.json_call(bare)) and (yield from self._rest_of_object())
            if key in _NAMES and name is None:
                name = self._tool(string_value((yield from self.json()) or ""))
                if name is None:
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
            else:
                other = yield from self._other_value()
                if other is None:
                    return False
                others[key] = other
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
            known = {key: text for key, text in others.items() if not parameter_kind(self._tools[name], key)[0].unknown}
            self.arguments("{" + ", ".join(f"{quoted(key)}: {text}" for key, text in known.items()) + "}")
        self.drop()
        return True

    def _tool(self, name: str | None) -> str | None:
        """The tool that a name stands for."""
        for each in () if name is None else (name, name.strip(), name.strip().removeprefix("functions.")):
            if each in self._tools:
                return each
        return None

    def _rest_of_object(self) -> Steps[bool]:
        """Reads over what else an object has, behind one of its values."""
        while True:
            yield from self.space()
            if (yield from self.accept("}")) or (yield from self._at_end()):
                self.drop()
                return True
            yield from self.accept(",")
            yield from self.space()
            if not (yield from self._key()):
                return False
            yield from self.space()
            if not (yield from self.accept(":")):
                return False
            yield from self.space()
            if not (yield from self._skip_value()):
                return False

    def _key(self) -> Steps[str]:
        if (yield from self.peek()) in QUOTES:
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
        text = (yield from self.json()) if first in ("{", "[") or first in QUOTES else None
        if text is None or text.startswith("{"):
            return text
        if text.startswith("["):
            return None if text.strip("[] \t\r\n") else "{}"
        inner = (string_value(text) or "").strip()
        if not inner:
            return "{}"
        return repaired(inner) if inner.startswith("{") else None

    def _skip_value(self) -> Steps[bool]:
        return (yield from self._other_value()) is not None

    def _other_value(self) -> Steps[str | None]:
        """Reads a value that is no call's arguments, and gives its JSON; None if it is none."""
        first = yield from self.peek()
        if first in ("{", "[") or first in QUOTES:
            return (yield from self.json())
        word = yield from self.word("_+-.")
        return (repaired(f"[{word}]") or "[]")[1:-1] or None
