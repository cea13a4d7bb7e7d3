"""Text that arrives in pieces, read by a generator that waits wherever it needs more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from actors.ingress.parsers.events import Content, Event
from actors.ingress.parsers.json_text import JsonScanner

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A part of a parser. It is suspended while it waits for text."""


class Reader(ABC):
    """A parser written as if the whole text were there.

    The text is read at a cursor. A mark stands before it, at the first character that is neither given out in an event
    nor dropped as markup, so that what turns out not to be in the format can still be given out as it is. Positions
    are never kept across a wait but in these two, because what is before the mark is thrown away then.

    Whatever a decision depends on is the text from the mark on, or its end, never the pieces in which it came.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark = 0
        self._received = 0
        self._ended = False
        self._events: list[Event] = []
        self._steps = self.parse()
        next(self._steps, None)

    @abstractmethod
    def parse(self) -> Steps[None]:
        """Reads all of the text."""

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0
        self._received += len(text)
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[Event]:
        """See `Parser`."""
        self._ended = True
        next(self._steps, None)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # -- giving out -----------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Gives an event out."""
        self._events.append(event)

    def content(self, text: str) -> None:
        """Gives text of the answer out."""
        if text:
            self.emit(Content(text))

    def drop(self) -> None:
        """What has been read is markup."""
        self._mark = self._at

    def give_back(self) -> None:
        """What has been read is not in the format: it is content."""
        self.content(self._text[self._mark : self._at])
        self._mark = self._at

    @property
    def read(self) -> int:
        """How many characters have been read from the mark on."""
        return self._at - self._mark

    def rewind(self) -> None:
        """Goes back to the mark."""
        self._at = self._mark

    # -- reading --------------------------------------------------------------------------------------------------

    def more(self) -> Steps[bool]:
        """Waits for more text; False when there is none."""
        received = self._received
        while self._received == received and not self._ended:
            yield
        return self._received != received

    def peek(self) -> Steps[str]:
        """The next character, empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def space(self) -> Steps[None]:
        """Reads over white space."""
        while (yield from self.peek()).isspace():
            self._at += 1

    def accept(self, literal: str) -> Steps[bool]:
        """Reads a literal if that comes next."""
        while True:
            have = self._text[self._at : self._at + len(literal)]
            if have == literal:
                self._at += len(literal)
                return True
            if not literal.startswith(have) or not (yield from self.more()):
                return False

    def word(self, also: str = "_-", most: int = 256) -> Steps[str]:
        """Reads letters, digits and the characters of `also`; empty if there are none or too many."""
        start = self.read
        while (character := (yield from self.peek())) and (character.isalnum() or character in also):
            self._at += 1
            if self.read - start > most:
                return ""
        return self._text[self._mark + start : self._at]

    def until(self, end: str) -> Steps[str | None]:
        """Reads up to a literal and over it. None if it does not come: then everything is read."""
        start = self.read
        while True:
            place = self._text.find(end, self._at)
            if place >= 0:
                found = self._text[self._mark + start : place]
                self._at = place + len(end)
                return found
            self._at = max(self._at, len(self._text) - len(end) + 1)
            if not (yield from self.more()):
                self._at = len(self._text)
                return None

    def give_until(
        self, ends: Sequence[str], give: Callable[[str], None], trim: Callable[[str], str] = str.rstrip
    ) -> Steps[str | None]:
        """Gives text out, as it comes, up to one of several literals, which is read; None if none comes.

        Of the text before the literal, `trim` takes away what does not belong to it. The mark is left before what was
        taken away. If no literal comes, everything is read and the mark is left before what `trim` would have taken.
        """
        while True:
            self._at = self._mark
            place, end = _first(self._text, ends, self._at)
            certain = place if end else len(self._text) - _begun(self._text, ends, self._at)
            text = trim(self._text[self._at : certain])
            if text:
                give(text)
                self._mark += len(text)
            if end:
                self._at = place + len(end)
                return end
            if not (yield from self.more()):
                rest = trim(self._text[self._mark :])
                if rest:
                    give(rest)
                    self._mark += len(rest)
                self._at = len(self._text)
                return None

    def json(self) -> Steps[str | None]:
        """Reads a JSON value that ends by itself; None if it does not or is none."""
        start = self.read
        scanner = JsonScanner()
        while True:
            self._at = scanner.scan(self._text, self._at)
            if scanner.done:
                return self._text[self._mark + start : self._at]
            if scanner.failed or not (yield from self.more()):
                return None

    def give_json(self, give: Callable[[str], None]) -> Steps[bool]:
        """Gives a JSON value out as it comes, and says whether it was one. Of one that is not, the mark is left before
        what cannot be part of it."""
        scanner = JsonScanner()
        while True:
            end = scanner.scan(self._text, self._at)
            if end > self._at:
                give(self._text[self._at : end])
            self._at = self._mark = end
            if scanner.done or scanner.failed or not (yield from self.more()):
                return scanner.done


def _first(text: str, literals: Sequence[str], start: int) -> tuple[int, str]:
    """The literal that comes first and its place; empty if none does."""
    found = [(place, literal) for literal in literals if (place := text.find(literal, start)) >= 0]
    return min(found) if found else (-1, "")


def _begun(text: str, literals: Sequence[str], start: int) -> int:
    """How many characters at the end may be the beginning of a literal."""
    longest = min(len(text) - start, max(map(len, literals)) - 1)
    for count in range(longest, 0, -1):
        if any(literal.startswith(text[-count:]) for literal in literals):
            return count
    return 0
