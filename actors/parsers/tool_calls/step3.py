"""Step 3."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.invoke_calls import InvokeCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS

_CALL, _CALL_END = "<｜tool_call_begin｜>", "<｜tool_call_end｜>"


@FORMATS.register("step3", template=lambda template: "steptml:invoke" in template, rank=2)
class StepCalls(InvokeCalls):
    """`<｜tool_calls_begin｜>`, for each call `<｜tool_call_begin｜>function<｜tool_sep｜>`, an
    `<steptml:invoke name="f">` with `<steptml:parameter name="k">` and `<｜tool_call_end｜>`, then
    `<｜tool_calls_end｜>`."""

    PREFIX = "steptml:"
    SECTIONS = ("｜tool_calls_begin｜",)

    def read_calls(self, marker: str) -> Steps[bool]:
        first = True
        while True:
            yield from self.space()
            if (yield from self.accept(_CALL)):
                yield from self.space()
                yield from self.accept("function")
                yield from self.space()
                yield from self.accept("<｜tool_sep｜>")
                yield from self.space()
            if not (first and not marker.endswith(">")) and not (yield from self._tag("<", "invoke")):
                if first:
                    return False
                yield from self.accept("<｜tool_calls_end｜>")
                self.drop()
                return True
            if not (yield from self._invoke()):
                return False
            yield from self.space()
            if (yield from self.accept(_CALL_END)):
                self.drop()
            first = False
