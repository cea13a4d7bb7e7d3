"""Reasoning between two tags at the beginning of the output, as all supported formats have it."""

from __future__ import annotations

from typing import ClassVar

from actors.ingress.parsers.events import Reasoning
from actors.ingress.parsers.reader import Reader, Steps


class TaggedReasoning(Reader):
    """`<think>` reasoning `</think>` answer, without the white space around the tags.

    Only at the beginning of the output does the first tag mean anything. Where the prompt has ended with it, the output
    begins inside, and a tag that the model writes again is no more than that.

    Args:
        inside: whether the output begins inside the reasoning.
    """

    OPEN: ClassVar[str] = "<think>"
    CLOSE: ClassVar[str] = "</think>"
    INTERRUPTIONS: ClassVar[tuple[str, ...]] = ()
    """What ends the reasoning if the model forgets the second tag; it belongs to the answer."""

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        super().__init__()

    def parse(self) -> Steps[None]:
        yield from self.space()
        opened = yield from self.accept(self.OPEN)
        if opened or self._inside:
            if not opened:
                self.rewind()
                yield from self.space()
            yield from self.space()
            self.drop()
            yield from self._reasoning()
        self.rewind()
        while True:
            self._at = len(self._text)
            self.give_back()
            if not (yield from self.more()):
                return

    def _reasoning(self) -> Steps[None]:
        end = yield from self.give_until((self.CLOSE, *self.INTERRUPTIONS), self._give)
        if end in self.INTERRUPTIONS:
            assert end is not None
            self._at -= len(end)
        elif end is not None:
            yield from self.space()
        self.drop()

    def _give(self, text: str) -> None:
        self.emit(Reasoning(text))
