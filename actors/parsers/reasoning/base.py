"""What the parsers of reasoning have in common."""

from __future__ import annotations

from typing import ClassVar

from llm_runtime.actors.parsers.events import Reasoning
from llm_runtime.actors.parsers.reader import Reader, Steps


class ReasoningParser(Reader):
    """Reasoning between two tags at the beginning of the output, `<think>` reasoning `</think>` answer in most formats,
    without the white space around the tags.

    Only at the beginning of the output does the first tag mean anything. Where the prompt has ended with it, the output
    begins inside, and a tag that the model writes again is no more than that.

    Some models begin a tool call without leaving the reasoning. What seems to be one is held back then: it is a part of
    the reasoning if the second tag comes after all, and a call if the output ends without it.

    Args:
        inside: whether the output begins inside the reasoning.
    """

    OPEN: ClassVar[str] = "<think>"
    CLOSE: ClassVar[str] = "</think>"
    CLOSING: ClassVar[str] = "\n</think>\n\n"
    """How models write the second tag, with the white space around it."""
    LABELS: ClassVar[tuple[str, ...]] = ()
    """What models may write behind the first tag, which is markup as well."""
    CALLS: ClassVar[tuple[str, ...]] = ()
    """With what tool calls begin that may stand in the reasoning."""
    ANSWER: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Tags that may stand around the answer."""
    ALWAYS: ClassVar[bool] = False
    """Whether an output is reasoning from its beginning on even if the prompt does not end with the first tag."""
    SPECIAL_TOKENS: ClassVar[bool] = False
    """Whether the tags are special tokens, which are no text unless that is asked for."""

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        super().__init__()

    @classmethod
    def begins_inside(cls, prompt: str) -> bool:
        """Whether an output begins inside the reasoning, by what the prompt ends with."""
        end = prompt.rstrip()
        for label in cls.LABELS:
            end = end.removesuffix(label.rstrip())
        return end.endswith(cls.OPEN) or (cls.ALWAYS and not end.endswith(cls.CLOSE))

    @classmethod
    def goes_on_inside(cls, text: str) -> bool:
        """The same of an output that goes on with an unfinished answer."""
        return text.rfind(cls.OPEN) > text.rfind(cls.CLOSE)

    def parse(self) -> Steps[None]:
        yield from self.space()
        opened = yield from self.accept(self.OPEN)
        while opened and (yield from self._again()):
            pass
        if opened or self._inside:
            if not opened:
                self.rewind()
                yield from self.space()
            yield from self.accept(*self.LABELS)
            yield from self.space()
            self.drop()
            yield from self._reasoning()
        yield from self._answer()

    def _again(self) -> Steps[bool]:
        """Reads the first tag once more, if the model has doubled it."""
        yield from self.space()
        return bool((yield from self.accept(self.OPEN)))

    def _reasoning(self) -> Steps[None]:
        while True:
            end = yield from self.give_until((self.CLOSE, *self.CALLS), self._give)
            if end is None:
                self.drop()
                return
            if end == self.CLOSE:
                yield from self.space()
                self.drop()
                return
            place = self.read - len(end)
            if (yield from self._seems_call()) and (yield from self.until(self.CLOSE)) is None:
                self.rewind(place)
                self.drop()
                return
            self.rewind(place + len(end))
            self._give(self.held())
            self.drop()

    def _seems_call(self) -> Steps[bool]:
        """Whether what follows the beginning of a call may be one: an object, a list, a tag, or a word before a tag."""
        yield from self.space()
        first = yield from self.peek()
        if first in ("", "{", "[", "<"):
            return True
        if not (yield from self.word("_-.:")):
            return False
        yield from self.space()
        return (yield from self.peek()) in ("", "<", "{")

    def _answer(self) -> Steps[None]:
        """Gives everything else out, without tags around it."""
        self.rewind()
        if not self.ANSWER:
            while True:
                self._at = len(self._text)
                self.give_back()
                if not (yield from self.more()):
                    return
        yield from self.space()
        opened = yield from self.accept(*(start for start, _ in self.ANSWER))
        close = dict(self.ANSWER).get(opened)
        if close is None:
            self.rewind()
        else:
            yield from self.space()
            self.drop()
        ends = (close,) if close else tuple(end for _, end in self.ANSWER)
        while (yield from self.give_until(ends, self.content)) is not None:
            yield from self.space()
            if close or not (yield from self.peek()):
                self.drop()
            else:
                self.give_back()
        if not close:
            self.give_back()

    def _give(self, text: str) -> None:
        if text:
            self.emit(Reasoning(text))
