"""GLM-4.5 to GLM-5."""

from __future__ import annotations

from typing import ClassVar

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS
from llm_runtime.actors.parsers.tool_calls.tagged_calls import TaggedCalls


@FORMATS.register("glm45", "glm", "glm47", template=lambda template: "<arg_key>" in template)
class GLMCalls(TaggedCalls):
    """`<tool_call>f`, for each parameter `<arg_key>k</arg_key><arg_value>v</arg_value>`, and `</tool_call>`. GLM-4.5
    and GLM-4.6 put line breaks between these, GLM-4.7 and GLM-5 do not."""

    MARKERS: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    ENDS: ClassVar[tuple[str, ...]] = ("</tool_call>",)
    NEXT = ("<arg_key>",)
    CALL_ENDS: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        name = yield from self.tool_name()
        if not name:
            return False
        yield from self.space()
        if not (yield from self._is_call()):
            return False
        return (yield from self.read_members(name))

    def read_members(self, name: str) -> Steps[bool]:
        """Reads a call from behind its name."""
        self.begin(name)
        while True:
            yield from self.space()
            whole = bool((yield from self.accept(*self.ENDS))) or (yield from self.after_tags())
            if whole or not (yield from self.accept("<arg_key>")):
                self.end_members()
                return whole
            key = yield from self.until("</arg_key>", "<arg_value>", *self.ENDS)
            if key is not None and key[1] == "</arg_key>":
                yield from self.space()
                value = yield from self.accept("<arg_value>")
            else:
                value = "" if key is None else key[1]
            if key is None or value != "<arg_value>":
                self.end_members()
                return key is not None and key[1] in self.ENDS
            yield from self.parameter(key[0].strip(), "</arg_value>")

    def _is_call(self) -> Steps[bool]:
        place = self.read
        found = bool((yield from self.accept("<arg_key>", *self.ENDS)))
        self.rewind(place)
        return found

    def follows_next(self) -> Steps[bool]:
        return True
        yield
