"""InternLM 2 and later, Intern-S1."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("interns1", "internlm", template=lambda template: "<|plugin|>" in template)
class InternLMCalls(JSONCalls):
    """`<|action_start|> <|plugin|>` {"name": "f", "parameters": {…}} `<|action_end|>`, once for each call."""

    MARKERS = ("<|action_start|>",)
    ENDS = ("<|action_end|>",)

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        if not (yield from self.accept("<|plugin|>")):
            return False
        return (yield from super().read_calls(marker))
