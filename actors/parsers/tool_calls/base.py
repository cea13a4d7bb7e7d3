"""What the parsers of tool calls have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from llm_runtime.actors.parsers.events import CallArguments, CallStart
from llm_runtime.actors.parsers.reader import Reader, Steps

Tools = Mapping[str, Any]
"""JSON schemas of the parameters of the tools that may be called, by their names."""

_MAX_READ_AGAIN = 2**20
"""Characters of an output that may be read a second time, since a call may begin in what seemed to be one."""
_LEFTOVERS = "}])\"' \t\r\n"


class ToolCallParser(Reader):
    """Text with tool calls in it, each of which begins with a marker.

    Arguments are given out as they come, and are whole JSON in the end. What is not in the format is content, and so is
    a call of a tool that there is not. Of a call that has begun and is broken, what was understood is given out, and
    the rest is dropped up to where it ends; if it has no end, the rest is content. A call that the end of the output
    cuts off before anything of it could be given out is dropped. White space between content and calls is markup.

    Args:
        tools: what may be called.
    """

    MARKERS: ClassVar[tuple[str, ...]]
    """With what calls begin."""
    ENDS: ClassVar[tuple[str, ...]] = ()
    """With what they end."""
    CALL_ENDS: ClassVar[tuple[str, ...]] = ()
    """With what calls end inside of these."""
    PLAIN: ClassVar[tuple[str, ...]] = ("[", "{")
    """Markers that are as well the beginning of other text, so nothing behind them is dropped."""
    SHORT_IDS: ClassVar[bool] = False
    """Whether the chat template takes identities of calls only if they have nine characters."""
    ONE_TURN: ClassVar[bool] = False
    """Whether the chat template takes the arguments of calls as text, and lets the model go on with its turn after the
    tools' results, without a new beginning."""

    STOPS: ClassVar[tuple[str, ...]] = ()
    """Ends, and markers that are the beginning of nothing else."""

    def __init_subclass__(cls) -> None:
        cls.STOPS = cls.ENDS + tuple(marker for marker in getattr(cls, "MARKERS", ()) if len(marker) > 1)

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._calls = 0
        self._nothing_since_call = False
        self._read_again = 0
        super().__init__()

    def parse(self) -> Steps[None]:
        while (marker := (yield from self.give_until(self.MARKERS, self.content))) is not None:
            yield from self.calls_after(marker)
        if not self._nothing_since_call:
            self.give_back()

    def calls_after(self, marker: str) -> Steps[None]:
        """Reads what follows a marker, whatever that is. Afterwards, the cursor is at the mark."""
        behind, calls, self._short = self.read, self._calls, False
        if marker.startswith("<"):
            yield from self._same_again(marker)
        whole = yield from self.read_calls(marker)
        if self._calls > calls:
            if not whole:
                yield from self._leave_call()
            yield from self._surplus_ends()
            self.rewind()
        elif whole or (self._short and marker not in self.PLAIN):
            if self._short:
                self._at = len(self._text)
            self._nothing_since_call = True
            self.drop()
        else:
            again = self.read - behind
            if self._read_again + again <= _MAX_READ_AGAIN:
                self._read_again += again
                self.rewind(behind)
            self.give_back()

    def _same_again(self, marker: str) -> Steps[None]:
        """Reads over a marker that comes more than once."""
        while True:
            place = self.read
            yield from self.space()
            if not (yield from self.accept(marker)):
                self.rewind(place)
                return

    def _leave_call(self) -> Steps[None]:
        """Goes behind a call that is broken."""
        self.rewind()
        found = (yield from self.until(*self.STOPS, *self.CALL_ENDS)) if self.STOPS else None
        if found is None:
            if not self.held().strip(_LEFTOVERS):
                self.drop()
            self.give_back()
            return
        if found[1] in self.MARKERS:
            self.rewind(self.read - len(found[1]))
        self.drop()

    def _surplus_ends(self) -> Steps[None]:
        """Reads over ends that come once too often."""
        ends = tuple(end for end in (*self.ENDS, *self.CALL_ENDS) if end.startswith("<"))
        while True:
            yield from self.space()
            if not (yield from self.accept(*ends)):
                return
            self.drop()

    @abstractmethod
    def read_calls(self, marker: str) -> Steps[bool]:
        """Reads what follows a marker. False if it is not in the format from the mark on; True without a call if it is
        something that is dropped."""

    def content(self, text: str) -> None:
        if text:
            self._nothing_since_call = False
        super().content(text)

    def start(self, name: str, identity: str = "") -> None:
        """A call begins; what has been read of it is markup."""
        self.emit(CallStart(self._calls, name, identity))
        self._calls += 1
        self._nothing_since_call = True
        self.drop()

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self.emit(CallArguments(self._calls - 1, text))

    def tool_name(self) -> Steps[str]:
        """Reads the name of a tool; empty if there is none of that name."""
        name = yield from self.word("_-.")
        if name in self._tools:
            return name
        if not any(each.startswith(name) for each in self._tools):
            self._short = False  # not cut off, but another name
        return ""

    def end(self, *ends: str) -> Steps[bool]:
        """Reads what ends a call, with surplus brackets before it. False, and nothing read, if that does not come."""
        place = self.read
        yield from self.space()
        ends = ends or self.ENDS
        surplus = ("}", "]") if "```" in ends else ("}", "]", "```")
        while (yield from self.accept(*surplus)):
            yield from self.space()
        if (yield from self.accept(*ends)):
            self.drop()
            return True
        self.rewind(place)
        return False

    def object_arguments(self, name: str, identity: str = "") -> Steps[bool]:
        """Starts a call if an object follows, and gives it out as its arguments. False if that is broken, or none."""
        yield from self.space()
        if (yield from self.peek()) != "{":
            return False
        self.start(name, identity)
        return (yield from self.give_json(self.arguments, self.STOPS))
