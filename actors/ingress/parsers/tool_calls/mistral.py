"""Mistral's models."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser


class MistralCalls(ToolCallParser):
    """`[TOOL_CALLS]` and a list, [{"name": "f", "arguments": {…}}, …]; since the eleventh version of the tokenizer
    a marker for each call, `[TOOL_CALLS]f[ARGS]{…}`, where `[CALL_ID]` and an identity may stand before `[ARGS]`, and
    `[ARGS]` may be left out."""

    MARKERS = ("[TOOL_CALLS]",)

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        if (yield from self.accept("[")):
            return (yield from self._list())
        name = yield from self.word("_-.")
        if name not in self._tools:
            return False
        if (yield from self.accept("[CALL_ID]")):
            yield from self.word()
        yield from self.accept("[ARGS]")
        yield from self.space()
        if (yield from self.peek()) != "{":
            return False
        self.start(name)
        return (yield from self.give_json(self.arguments))

    def _list(self) -> Steps[bool]:
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
