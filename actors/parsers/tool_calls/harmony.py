"""gpt-oss."""

from __future__ import annotations

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS

MESSAGE = "<|message|>"


@FORMATS.register("gpt-oss", "openai", template=lambda template: "<|start|>assistant" in template)
class HarmonyCalls(ToolCallParser):
    """Messages of harmony that have a recipient: `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}
    <|call|>`, where the recipient may as well stand before the channel, and `<|start|>assistant` before that. Of the
    others the text is content; what the reasoning's parser has taken away does not come here."""

    MARKERS = ("<|start|>", "<|channel|>", "<|call|>", "<|end|>", "<|return|>")
    ENDS = ("<|call|>", "<|end|>", "<|return|>")

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker in self.ENDS:
            return True
        header = yield from self.until(MESSAGE, *self.ENDS)
        if header is None or header[1] != MESSAGE:
            return False
        recipient = recipient_of(header[0])
        if recipient is None:
            self.drop()
            return True
        name = recipient if recipient in self._tools else recipient.removeprefix("functions.")
        if name not in self._tools:
            return False
        yield from self.space()
        if (yield from self.accept(*self.ENDS)):
            self.start(name)
            self.arguments("{}")
            return True
        if not (yield from self.object_arguments(name)):
            return False
        yield from self.end()
        return True


def recipient_of(header: str) -> str | None:
    """To whom a message goes; None if it goes to the user."""
    _, found, rest = header.partition("to=")
    recipient = rest.split()[0].partition("<")[0] if found and rest.strip() else ""
    return recipient if recipient and recipient not in ("user", "assistant") else None
