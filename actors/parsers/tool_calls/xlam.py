"""xLAM."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("xlam", template=lambda template: "calls in a single JSON array" in template, rank=2)
class XLAMCalls(JSONCalls):
    """A list of calls, [{"name": "f", "arguments": {…}}, …]: alone, in a block of Markdown, after `[TOOL_CALLS]`, or
    between `<tool_call>` and `</tool_call>`."""

    MARKERS = ("[TOOL_CALLS]", "<tool_call>", "```json", "```", "[")
    ENDS = ("</tool_call>", "```")
    PLAIN = ("[", "```", "```json")

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker.startswith("```"):
            yield from self.space()
            if (yield from self.peek()) != "[":
                return False
        return (yield from super().read_calls(marker))
