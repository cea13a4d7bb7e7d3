"""Formats with a section that holds the calls, each between markers of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class SectionCalls(ToolCallParser):
    """Calls in a section. Models leave its first marker out at times."""

    SECTION: ClassVar[str]
    SECTION_END: ClassVar[str]
    CALL: ClassVar[str]
    CALL_END: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.MARKERS = (cls.SECTION, cls.CALL)

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker == self.SECTION:
            yield from self.space()
            if not (yield from self.accept(self.CALL)):
                return False
        while True:
            if not (yield from self.read_call()):
                return False
            yield from self.space()
            if (yield from self.accept(self.CALL_END)):
                self.drop()
                yield from self.space()
            if (yield from self.accept(self.CALL)):
                continue
            if (yield from self.accept(self.SECTION_END)):
                self.drop()
            return True

    @abstractmethod
    def read_call(self) -> Steps[bool]:
        """Reads a call from behind its first marker to before its last one."""
