"""Mistral's models."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("mistral", template=lambda template: "[TOOL_CALLS]" in template)
class MistralCalls(JSONCalls):
    """`[TOOL_CALLS]` and a list, [{"name": "f", "arguments": {…}}, …]; since the eleventh version of the tokenizer
    a marker for each call, `[TOOL_CALLS]f[ARGS]{…}`, where `[CALL_ID]` and an identity may stand before `[ARGS]`, and
    `[ARGS]` may be left out."""

    MARKERS = ("[TOOL_CALLS]",)
    SHORT_IDS = True

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        if (yield from self.peek()) in ("[", "{"):
            return (yield from super().read_calls(marker))
        name = yield from self.tool_name()
        if not name:
            return False
        yield from self.space()
        if (yield from self.accept("[CALL_ID]")):
            yield from self.space()
            yield from self.word()
            yield from self.space()
        yield from self.accept("[ARGS]")
        return (yield from self.object_arguments(name))
