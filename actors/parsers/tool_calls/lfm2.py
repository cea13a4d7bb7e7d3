"""LFM2."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.pythonic import PythonCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register(
    "lfm2", template=lambda template: "<|tool_call_start|>" in template or "<|tool_list_start|>" in template
)
class LFMCalls(PythonCalls, JSONCalls):
    """`<|tool_call_start|>` [f(k="v"), g()] `<|tool_call_end|>`, or a list of objects in JSON there."""

    MARKERS = ("<|tool_call_start|>",)
    ENDS = ("<|tool_call_end|>",)
    FRAMES = MARKERS

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        place = self.read
        if (yield from self.accept("[")):
            yield from self.space()
        json = (yield from self.peek()) == "{"
        self.rewind(place)
        return (yield from (JSONCalls if json else PythonCalls).read_calls(self, marker))
