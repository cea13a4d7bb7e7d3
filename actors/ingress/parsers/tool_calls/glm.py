"""GLM-4.5 to GLM-5."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class GLMCalls(ToolCallParser):
    """`<tool_call>f`, for each parameter `<arg_key>k</arg_key><arg_value>v</arg_value>`, and `</tool_call>`. GLM-4.5
    and GLM-4.6 put line breaks between these, GLM-4.7 and GLM-5 do not."""

    MARKERS = ("<tool_call>",)

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        name = yield from self.word("_-.")
        yield from self.space()
        if name not in self._tools or (yield from self.peek()) != "<":
            return False
        first = True
        while True:
            yield from self.space()
            if (yield from self.accept("</tool_call>")):
                if first:
                    self.start(name)
                self.end_members(none=first)
                return True
            before = self.read
            if not (yield from self.accept("<arg_key>")):
                return False
            key = yield from self.until("</arg_key>")
            yield from self.space()
            if key is None or not (yield from self.accept("<arg_value>")):
                return False
            if first:
                self.start(name, markup=before)
            if not (yield from self.parameter(name, key.strip(), first, "</arg_value>")):
                return False
            first = False
