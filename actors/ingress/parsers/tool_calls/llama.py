"""Llama 3.1 to 3.3."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class LlamaCalls(ToolCallParser):
    """{"name": "f", "parameters": {…}}, where several are parted by semicolons: after `<|python_tag|>`, or without it
    at the beginning of the output, if that is a call of a tool that there is."""

    MARKERS = ("<|python_tag|>",)

    def parse(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.peek()) == "{" and not (yield from self._objects(bare=True)):
            self.give_back()
        self.rewind()
        yield from super().parse()

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        return (yield from self._objects(bare=False))

    def _objects(self, bare: bool) -> Steps[bool]:
        while True:
            if not (yield from self.json_call(bare)):
                return False
            yield from self.space()
            if (yield from self.accept(";")):
                self.drop()
                yield from self.space()
            if (yield from self.peek()) != "{":
                return True
