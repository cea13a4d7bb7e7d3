"""Qwen3-Coder, Qwen3.5, MiMo, Step 3.5 and Nemotron 3."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS
from llm_runtime.actors.parsers.tool_calls.tagged_calls import TaggedCalls


@FORMATS.register(
    "qwen3_coder",
    "mimo",
    "qwen3_xml",
    "step3p5",
    template=lambda template: "<function=" in template and "<parameter=" in template,
)
class QwenCoderCalls(TaggedCalls):
    """`<function=f>`, for each parameter `<parameter=k>`, its value in lines of its own and `</parameter>`, and
    `</function>`; all this between `<tool_call>` and `</tool_call>`, which the models leave out at times."""

    MARKERS = ("<tool_call>", "<function=")
    ENDS = ("</tool_call>",)
    NEXT = ("<parameter=",)
    CALL_ENDS = ("</function>", "</tool_call>")
    NEWLINES = True

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker != "<function=":
            yield from self.space()
            if not (yield from self.accept("<function=")):
                return False
        while True:
            if not (yield from self._function()):
                return False
            yield from self.space()
            if (yield from self.accept(*self.ENDS)):
                self.drop()
                return True
            if not (yield from self.accept("<function=")):
                return True

    def _function(self) -> Steps[bool]:
        name = yield from self._name("_-.")
        yield from self.space()
        if name not in self._tools or (yield from self.peek()) != "<":
            return False
        self.begin(name)
        while True:
            yield from self.space()
            whole = bool((yield from self.accept("</function>"))) or (yield from self.after_tags())
            key = "" if whole or not (yield from self.accept("<parameter=")) else (yield from self._name("_-.$ "))
            if not key:
                self.end_members()
                return whole
            yield from self.parameter(key, "</parameter>")

    def _name(self, also: str) -> Steps[str]:
        """Reads a name, which may stand in quotes, and the end of its tag; empty if there is none."""
        quote = yield from self.accept('"', "'")
        name = yield from self.word(also)
        if quote:
            yield from self.accept(quote)
        return name.strip() if (yield from self.accept(">")) else ""
