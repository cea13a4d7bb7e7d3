"""Qwen3-Coder and Qwen3.5."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class QwenCoderCalls(ToolCallParser):
    """`<function=f>`, for each parameter `<parameter=k>`, its value in lines of its own and `</parameter>`, and
    `</function>`; all this between `<tool_call>` and `</tool_call>`, which the models leave out at times."""

    MARKERS = ("<tool_call>", "<function=")

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker == "<tool_call>":
            yield from self.space()
            if not (yield from self.accept("<function=")):
                return False
        while True:
            if not (yield from self._function()):
                return False
            yield from self.space()
            if (yield from self.accept("</tool_call>")):
                self.drop()
                return True
            if not (yield from self.accept("<function=")):
                return True

    def _function(self) -> Steps[bool]:
        name = yield from self.word("_-.")
        if name not in self._tools or not (yield from self.accept(">")):
            return False
        first = True
        while True:
            yield from self.space()
            if (yield from self.accept("</function>")):
                if first:
                    self.start(name)
                self.end_members(none=first)
                return True
            before = self.read
            if not (yield from self.accept("<parameter=")):
                return False
            key = yield from self.word("_-.$ ")
            if not key.strip() or not (yield from self.accept(">")):
                return False
            if first:
                self.start(name, markup=before)
            if not (yield from self.parameter(name, key.strip(), first, "</parameter>", newlines=True)):
                return False
            first = False
