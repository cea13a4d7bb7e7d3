"""Calls that a grammar has forced, in a form that does not depend on the model."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class JSONListCalls(ToolCallParser):
    """[{"name": "f", "parameters": {…}}, …], which is the whole output; see `calls_schema`."""

    MARKERS = ("[",)

    def read_calls(self, marker: str) -> Steps[bool]:
        while True:
            yield from self.space()
            if not (yield from self.json_call()):
                return False
            yield from self.space()
            if (yield from self.accept("]")):
                self.drop()
                return True
            if not (yield from self.accept(",")):
                return False
            self.drop()
