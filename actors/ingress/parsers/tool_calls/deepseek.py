"""DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.sections import SectionCalls

_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekV31Calls(SectionCalls):
    """`<｜tool▁calls▁begin｜>`, for each call `<｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, and
    `<｜tool▁calls▁end｜>`."""

    SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"

    def read_call(self) -> Steps[bool]:
        yield from self.space()
        name = yield from self.word("_-.")
        yield from self.space()
        if name not in self._tools or not (yield from self.accept(_SEPARATOR)):
            return False
        return (yield from self.read_arguments(name))

    def read_arguments(self, name: str) -> Steps[bool]:
        """Starts the call if an object follows, and gives it out."""
        yield from self.space()
        if (yield from self.peek()) != "{":
            return False
        self.start(name)
        return (yield from self.give_json(self.arguments))


class DeepSeekV3Calls(DeepSeekV31Calls):
    """The same markers with `function<｜tool▁sep｜>f`, a line break, and the arguments in a block of Markdown."""

    def read_call(self) -> Steps[bool]:
        yield from self.space()
        if not (yield from self.accept("function" + _SEPARATOR)):
            return False
        yield from self.space()
        name = yield from self.word("_-.")
        if name not in self._tools:
            return False
        yield from self.space()
        fenced = yield from self.accept("```json")
        if not (yield from self.read_arguments(name)):
            return False
        if fenced:
            yield from self.space()
            if (yield from self.accept("```")):
                self.drop()
        return True
