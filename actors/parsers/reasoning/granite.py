"""Granite 3."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.reasoning.registry import FORMATS

_THOUGHTS = ("Here is my thought process:", "Here's my thought process:")
_RESPONSES = ("Here is my response:", "Here's my response:")


@FORMATS.register("granite", template=lambda template: "my thought process" in template, rank=1)
class GraniteReasoning(ReasoningParser):
    """Granite 3.2 begins with "Here is my thought process:" and goes on with "Here is my response:"; Granite 3.3 uses
    `<think>` and `<response>`."""

    CLOSING = "\n\nHere is my response:\n\n"
    ANSWER = (("<response>", "</response>"),)

    def parse(self) -> Steps[None]:
        yield from self.space()
        if self._inside or not (yield from self.accept(*_THOUGHTS)):
            self.rewind()
            yield from super().parse()
            return
        yield from self.space()
        self.drop()
        if (yield from self.give_until(_RESPONSES, self._give)) is not None:
            yield from self.space()
        self.drop()
        yield from self._answer()
