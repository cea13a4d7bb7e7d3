"""DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS
from llm_runtime.actors.parsers.tool_calls.sections import SectionCalls

_SEPARATOR = "<｜tool▁sep｜>"
_MARK = "<｜tool▁call▁begin｜>"


@FORMATS.register("deepseekv31", "deepseek_v31", template=lambda template: _MARK in template)
class DeepSeekV31Calls(SectionCalls):
    """`<｜tool▁calls▁begin｜>`, for each call `<｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, and
    `<｜tool▁calls▁end｜>`."""

    SECTIONS, SECTION_ENDS = ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",)
    CALL, CALL_END = _MARK, "<｜tool▁call▁end｜>"
    ONE_TURN = True

    def read_call(self) -> Steps[bool]:
        yield from self.space()
        name = yield from self.tool_name()
        if not name:
            return False
        yield from self.space()
        if not (yield from self.accept(_SEPARATOR)):
            return False
        return (yield from self.object_arguments(name))


@FORMATS.register(
    "deepseekv3", "deepseek_v3", template=lambda template: _MARK in template and "```json" in template, rank=1
)
class DeepSeekV3Calls(DeepSeekV31Calls):
    """The same markers with `function<｜tool▁sep｜>f`, a line break, and the arguments in a block of Markdown."""

    def read_call(self) -> Steps[bool]:
        yield from self.space()
        if not (yield from self.accept("function" + _SEPARATOR)):
            return False
        yield from self.space()
        name = yield from self.tool_name()
        if not name:
            return False
        yield from self.space()
        fenced = yield from self.accept("```json", "```")
        if not (yield from self.object_arguments(name)):
            return False
        if fenced:
            yield from self.end("```")
        return True
