"""Llama 3.1 to 3.3, and Llama 4 with JSON."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("llama3", "llama3_json", "llama4_json", template=lambda template: "<|python_tag|>" in template)
class LlamaCalls(JSONCalls):
    """{"name": "f", "parameters": {…}}, where several are parted by semicolons: after `<|python_tag|>`, or without it
    at the beginning of the output, if that is a call of a tool that there is. What stands before a call there and is
    none is dropped."""

    MARKERS = ("<|python_tag|>",)
    SEPARATORS = (";",)

    def parse(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.peek()) == "{":
            yield from self._bare()
        self.rewind()
        yield from super().parse()

    def _bare(self) -> Steps[None]:
        calls = self._calls
        if not (yield from self._several(bare=True)):
            if self._calls > calls:
                yield from self._leave_call()
            else:
                self.give_back()

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        while (yield from self.peek()) in ("{", "["):
            begun, before = self._calls, self.read
            if (yield from super().read_calls(marker)):
                return True
            if self._calls > begun:
                return False
            self.rewind(before)
            found = yield from self.until(";", "\n", *self.MARKERS)
            if found is None:
                return False
            yield from self.space()
        return False

    def _several(self, bare: bool) -> Steps[bool]:
        while True:
            if not (yield from self.json_call(bare)):
                return False
            yield from self.space()
            if (yield from self.accept(";")):
                self.drop()
                yield from self.space()
            if (yield from self.peek()) != "{":
                return True
