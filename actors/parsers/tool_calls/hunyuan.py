"""Hunyuan A13B and Hunyuan 3."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.glm import GLMCalls
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("hunyuan", "hy_v3", template=lambda template: "<tool_sep>" in template, rank=1)
class HunyuanCalls(GLMCalls):
    """`<tool_calls>`, for each call `<tool_call>f<tool_sep>` and GLM's parameters, and `</tool_calls>`."""

    MARKERS = ("<tool_calls>", "<tool_call>")
    ENDS = ("</tool_call>", "</tool_calls>")
    CALL_ENDS = ("</tool_call>", "</tool_calls>")

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker == "<tool_calls>":
            yield from self.space()
            if not (yield from self.accept("<tool_call>")):
                return False
        while True:
            yield from self.space()
            name = yield from self.tool_name()
            if not name:
                return False
            yield from self.space()
            if not (yield from self.accept("<tool_sep>")):
                return False
            if not (yield from self.read_members(name)):
                return False
            yield from self.space()
            if (yield from self.accept("</tool_calls>")):
                self.drop()
                return True
            if not (yield from self.accept("<tool_call>")):
                return True


@FORMATS.register("hunyuan_a13b", template=lambda template: "<tool_calls>" in template and "助手" in template, rank=1)
class HunyuanA13BCalls(JSONCalls):
    """`<tool_calls>` [{"name": "f", "arguments": {…}}, …] `</tool_calls>`."""

    MARKERS = ("<tool_calls>",)
    ENDS = ("</tool_calls>",)
