"""Calls whose parameters are written one by one, between tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from llm_runtime.actors.parsers.json_text import quoted
from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.parsers.tool_calls.values import TEXT, parameter_kind, value_json


class TaggedCalls(ToolCallParser):
    """What such formats share: values up to a tag, given out as members of an object.

    A parameter that is a string is given out as it comes, others when they are whole. Where a schema has alternatives
    and it is not yet known which one the call follows, its parameters wait for the end of the call.

    Models forget closing tags or misspell them. A value ends as well where the next parameter begins, or the call ends
    for certain: at a tag behind which only further tags follow.
    """

    NEWLINES: ClassVar[bool] = False
    """Whether a value has lines of its own, so that a line break at each of its ends is markup."""
    NEXT: ClassVar[tuple[str, ...]] = ()
    """With what a parameter begins."""
    CLOSES: ClassVar[tuple[str, ...]] = ()
    """With what misspelled ends of parameters begin, besides the right one."""

    def begin(self, name: str, identity: str = "") -> None:
        """A call begins."""
        self._schema = self._tools[name]
        self._given: dict[str, str] = {}
        self._waiting: list[tuple[str, str, bool]] | None = None
        self._members = 0
        self.start(name, identity)

    def end_members(self) -> None:
        """Ends the arguments, of which there may be none."""
        for key, text, string in self._waiting or ():
            kind = TEXT if string else parameter_kind(self._schema, key, self._given)[0]
            self._member(key, value_json(text, kind))
        self._waiting = None
        self.arguments("}" if self._members else "{}")
        self.drop()

    def parameter(self, key: str, close: str, string: bool | None = None) -> Steps[None]:
        """Reads the value of a parameter, with the tag that closes it.

        Args:
            close: that tag.
            string: whether the value is a string, whatever the schema says; or certainly none; None if not known.
        """
        self.drop()
        kind, certain = (TEXT, True) if string else parameter_kind(self._schema, key, self._given)
        if string is False and kind == TEXT:
            kind, certain = parameter_kind(None, key)
        if self._waiting is None and not certain:
            self._waiting = []
        stream = self._waiting is None and kind.types == TEXT.types
        pieces: list[str] = []
        if self.NEWLINES:
            yield from self.accept("\n")
            self.drop()
        if stream:
            self._member(key, '"')

        def give(text: str) -> None:
            pieces.append(text)
            if stream and text:
                self.arguments(quoted(text)[1:-1])

        yield from self._value(close, give)
        text = "".join(pieces)
        self._given[key] = text
        if stream:
            self.arguments('"')
        elif self._waiting is not None:
            self._waiting.append((key, text, string is True))
        else:
            self._member(key, value_json(text, kind))

    def _value(self, close: str, give: Callable[[str], None]) -> Steps[None]:
        stem = close.removesuffix(">")
        while True:
            ends = (stem, *self.CLOSES, *self.NEXT, *self.CALL_ENDS)
            found = yield from self.give_until(ends, give, release=False)
            space = self.held()[: self.read - len(found or "")]
            if found is None:
                if self.NEWLINES:
                    give(_without_newline(space.partition("<")[0]))
                self.drop()
                return
            place = self.read - len(found)
            if found == stem or found in self.CLOSES:
                if found == stem and (yield from self.accept(close.removeprefix(stem))):
                    give(_without_newline(space) if self.NEWLINES else space)
                    self.drop()
                    return
                yield from self.word()  # the tag may be misspelled
                yield from self.accept(">")
                yield from self.space()
            else:
                self.rewind(place)
            behind = self.read
            if (yield from self._ends_value()):
                self.rewind(behind)
                if self.NEWLINES:
                    give(_without_newline(space))
                self.drop()
                return
            self.rewind(place + len(found))
            give(self.held())
            self.drop()

    def _ends_value(self) -> Steps[bool]:
        """Whether what comes next ends a value that has not been closed."""
        if (yield from self.accept(*self.NEXT)):
            return (yield from self.follows_next())
        while True:
            yield from self.space()
            if not (yield from self.peek()) or (yield from self.accept(*self.STOPS)):
                return True
            if not (yield from self.accept(*self.CALL_ENDS)):
                return False

    def empty_parameter(self, key: str) -> None:
        """The same for a parameter without a value."""
        if self._waiting is None:
            self._waiting = []
        self._waiting.append((key, "", False))

    def after_tags(self) -> Steps[bool]:
        """Whether nothing more of a call can come: its end, another call, or nothing at all comes next."""
        place = self.read
        yield from self.space()
        found = not (yield from self.peek()) or bool((yield from self.accept(*self.STOPS)))
        self.rewind(place)
        return found

    def follows_next(self) -> Steps[bool]:
        """Reads what makes the beginning of a parameter certain, from behind one of `NEXT`."""
        yield from self.space()
        yield from self.accept('"')
        return bool((yield from self.word("_-.$ ")))

    def _member(self, key: str, value: str) -> None:
        self.arguments(f"{', ' if self._members else '{'}{quoted(key)}: {value}")
        self._members += 1


def _without_newline(text: str) -> str:
    return text.removesuffix("\n")
