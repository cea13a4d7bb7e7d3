"""gpt-oss."""

from __future__ import annotations

from llm_runtime.actors.parsers.events import Content
from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.reasoning.registry import FORMATS

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")


@FORMATS.register("gpt-oss", "openai_gptoss", template=lambda template: "<|start|>assistant" in template, rank=1)
class HarmonyReasoning(ReasoningParser):
    """Messages in channels, `<|channel|>analysis<|message|>`, text, `<|end|>`, `<|start|>assistant` and the next one.
    The channel `analysis` is reasoning. Messages with a recipient are tool calls, and left as they are for their
    parser. Those of the other channels are the answer, and so is text outside of messages."""

    OPEN, CLOSE = "<|channel|>analysis<|message|>", "<|end|>"
    CLOSING = "<|end|><|start|>assistant<|channel|>final<|message|>"
    SPECIAL_TOKENS = True

    def parse(self) -> Steps[None]:
        if self._inside:
            yield from self._message(reasoning=True)
        while True:
            found = yield from self.give_until((_START, _CHANNEL, *_ENDS), self.content, str)
            if found is None:
                self.give_back()
                return
            if found in _ENDS:
                self.drop()
                continue
            header = yield from self.until(_MESSAGE, *_ENDS)
            if header is None or header[1] != _MESSAGE:
                self.drop()
                continue
            if "to=" in header[0]:
                self.give_back()
                yield from self._call()
                continue
            self.drop()
            yield from self._message(reasoning=header[0].rpartition(_CHANNEL)[2].split()[:1] == ["analysis"])

    def _message(self, reasoning: bool) -> Steps[None]:
        """Reads the text of a message, which a new one ends as well."""
        found = yield from self.give_until((*_ENDS, _START, _CHANNEL), self._give if reasoning else self.content, str)
        if found in (_START, _CHANNEL):
            self.rewind(self.read - len(found or ""))
        self.drop()

    def _call(self) -> Steps[None]:
        """Gives a call to the parser of calls as it comes, with what ends it."""
        found = yield from self.give_until(_ENDS, self._pass_on, str)
        if found is not None:
            self._pass_on(found)
        self.drop()

    def _pass_on(self, text: str) -> None:
        if text:
            self.emit(Content(text))
