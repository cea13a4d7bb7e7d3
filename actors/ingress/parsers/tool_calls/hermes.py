"""Hermes 2 Pro and later, Qwen2.5 and Qwen3."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class HermesCalls(ToolCallParser):
    """`<tool_call>` {"name": "f", "arguments": {…}} `</tool_call>`, one pair of tags for each call."""

    MARKERS = ("<tool_call>",)

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        while True:
            if not (yield from self.json_call()):
                return False
            yield from self.space()
            if (yield from self.accept("</tool_call>")):
                self.drop()
                return True
            if (yield from self.peek()) != "{":
                return True
