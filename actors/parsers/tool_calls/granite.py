"""Granite 3 and Granite 20B for function calling. Granite 4 writes as Hermes does."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("granite", template=lambda template: "<|tool_call|>" in template and "<|tool|>" not in template)
class GraniteCalls(JSONCalls):
    """`<|tool_call|>` or `<tool_call>` and a list, [{"name": "f", "arguments": {…}}, …]; at the beginning of the output
    the list may stand alone."""

    MARKERS = ("<|tool_call|>", "<tool_call>")
    ENDS = ("</tool_call>",)

    def parse(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.accept("[")):
            yield from self.calls_after("[")
        self.rewind()
        yield from super().parse()


@FORMATS.register("granite-20b-fc", template=lambda template: "<function_call>" in template)
class Granite20BCalls(JSONCalls):
    """`<function_call>` {"name": "f", "arguments": {…}}, a marker for each call."""

    MARKERS = ("<function_call>",)
    ENDS = ("</function_call>",)
