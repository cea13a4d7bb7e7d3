"""Formats with a section that holds the calls, each between markers of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser


class SectionCalls(ToolCallParser):
    """Calls in a section. Models leave its first marker out at times."""

    SECTIONS: ClassVar[tuple[str, ...]]
    SECTION_ENDS: ClassVar[tuple[str, ...]]
    CALL: ClassVar[str]
    CALL_END: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.MARKERS = (*cls.SECTIONS, cls.CALL)
        cls.ENDS = (cls.CALL_END, *cls.SECTION_ENDS)
        super().__init_subclass__()

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker in self.SECTIONS:
            yield from self.space()
            if (yield from self.accept(*self.SECTION_ENDS)):
                return True
            if not (yield from self.accept(self.CALL)):
                return False
        while True:
            if not (yield from self.read_call()):
                return False
            yield from self.end(self.CALL_END)
            yield from self.space()
            if (yield from self.accept(self.CALL)):
                continue
            if (yield from self.accept(*self.SECTION_ENDS)):
                self.drop()
            return True

    @abstractmethod
    def read_call(self) -> Steps[bool]:
        """Reads a call from behind its first marker to before its last one."""
