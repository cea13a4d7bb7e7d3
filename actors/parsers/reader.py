"""Text that arrives in pieces, read by a generator that waits wherever it needs more."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

from llm_runtime.actors.parsers.events import Content, Event
from llm_runtime.actors.parsers.json_text import LenientJson

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A part of a parser. It is suspended while it waits for text."""

_SPACE = re.compile(r"\s*")


class Reader(ABC):
    """A parser written as if the whole text were there.

    The text is read at a cursor. A mark stands before it, at the first character that is neither given out in an event
    nor dropped as markup, so that what turns out not to be in the format can still be given out as it is. Places are
    numbers of characters from the mark on.

    Whatever a decision depends on is the text from the mark on, or its end, never the pieces in which it came. Each
    character is looked at a bounded number of times, however long it is held back: what has been read is kept in
    pieces, and only what has not is searched.
    """

    def __init__(self) -> None:
        self._kept: list[str] = []  # from the mark on, what was read before `_text` began
        self._kept_length = 0
        self._text = ""
        self._at = 0
        self._mark = 0  # in `_text`; 0 while something is kept
        self._received = 0
        self._ended = False
        self._short = False
        self._events: list[Event] = []
        self._steps = self.parse()
        next(self._steps, None)

    @abstractmethod
    def parse(self) -> Steps[None]:
        """Reads all of the text."""

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if self._at:
            self._keep(self._text[self._mark : self._at])
            self._text = self._text[self._at :] + text
            self._at = self._mark = 0
        else:
            self._text += text
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

    def _keep(self, text: str) -> None:
        if text:
            self._kept.append(text)
            self._kept_length += len(text)

    # -- giving out -----------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Gives an event out."""
        self._events.append(event)

    def content(self, text: str) -> None:
        """Gives text of the answer out."""
        if text:
            self.emit(Content(text))

    def held(self) -> str:
        """What has been read from the mark on."""
        return "".join(self._kept) + self._text[self._mark : self._at]

    def drop(self) -> None:
        """What has been read is markup."""
        self._kept.clear()
        self._kept_length = 0
        self._mark = self._at

    def give_back(self) -> None:
        """What has been read is not in the format: it is content."""
        self.content(self.held())
        self.drop()

    @property
    def read(self) -> int:
        """How many characters have been read from the mark on."""
        return self._kept_length + self._at - self._mark

    def rewind(self, place: int = 0) -> None:
        """Goes back to a place, the mark if none is given."""
        if place < self._kept_length:
            self._text = "".join(self._kept) + self._text[self._mark :]
            self._kept.clear()
            self._kept_length = self._mark = 0
        self._at = self._mark + place - self._kept_length

    # -- reading --------------------------------------------------------------------------------------------------

    def more(self) -> Steps[bool]:
        """Waits for more text; False when there is none."""
        received = self._received
        while self._received == received and not self._ended:
            yield
        if self._received == received:
            self._short = True
            return False
        return True

    def peek(self) -> Steps[str]:
        """The next character, empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def space(self) -> Steps[None]:
        """Reads over white space."""
        yield from self.run(_SPACE)

    def run(self, pattern: re.Pattern[str], most: int | None = None) -> Steps[str]:
        """Reads characters of a class, which the pattern repeats; stops soon after so many if a number is given."""
        pieces: list[str] = []
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            pieces.append(match.group())
            if most is not None and sum(map(len, pieces)) > most:
                return ""
            if self._at < len(self._text) or not (yield from self.more()):
                return "".join(pieces)

    def word(self, also: str = "_-", most: int = 256) -> Steps[str]:
        """Reads letters, digits and the characters of `also`; empty if there are none or too many."""
        return (yield from self.run(_word(also), most))

    def accept(self, *literals: str) -> Steps[str]:
        """Reads a literal if one of them comes next, the longest of those that do; empty if none does."""
        while literals:
            found = max((each for each in literals if self._text.startswith(each, self._at)), key=len, default="")
            rest = self._text[self._at : self._at + max(map(len, literals))]
            longer = any(len(each) > len(rest) and each.startswith(rest) for each in literals)
            if not longer or not (yield from self.more()):
                self._at += len(found)
                return found
        return ""

    def until(self, *ends: str) -> Steps[tuple[str, str] | None]:
        """Reads up to a literal and over it; gives the text before it and the literal. None if none comes: then
        everything is read."""
        pieces: list[str] = []
        search = _search(ends)
        while True:
            final = self._ended
            piece, end = search.next(self._text, self._at, final)
            pieces.append(piece)
            self._at += len(piece) + len(end)
            if end:
                return "".join(pieces), end
            if final:
                self._short = True
                return None
            yield from self.more()

    def give_until(
        self,
        ends: Sequence[str],
        give: Callable[[str], None],
        trim: Callable[[str], str] = str.rstrip,
        release: bool = True,
    ) -> Steps[str | None]:
        """Gives text from the mark on out, as it comes, up to one of several literals, which is read; None if none
        comes.

        Of the text before the literal, `trim` takes away what does not belong to it. The mark is left before what was
        taken away. If no literal comes, everything is read and the mark is left before what `trim` would have taken,
        and, unless `release`, before the beginning of a literal.
        """
        search = _search(tuple(ends))
        while True:
            final = self._ended
            piece, end = search.next(self._text, self._at, final and release)
            self._at += len(piece)
            if piece and not (trim is str.rstrip and piece.isspace()):
                text = self.held()
                kept = trim(text)
                if kept:
                    give(kept)
                self.drop()
                self._keep(text[len(kept) :])
            if end:
                self._at += len(end)
                return end
            if final:
                self._at = len(self._text)
                return None
            yield from self.more()

    def json(self, stops: tuple[str, ...] = ()) -> Steps[str | None]:
        """Reads a value that is JSON or meant to be, and gives its JSON; None if it is none or has no end."""
        pieces: list[str] = []
        return "".join(pieces) if (yield from self._scan(pieces.append, stops)).done else None

    def give_json(self, give: Callable[[str], None], stops: tuple[str, ...] = ()) -> Steps[bool]:
        """Gives such a value out as it comes, and says whether it was whole. One that is not is closed.

        Args:
            stops: literals that come behind the value, and end it.
        """

        def give_and_drop(text: str) -> None:
            give(text)
            self.drop()

        scanner = yield from self._scan(give_and_drop, stops)
        self.drop()
        give(scanner.close())
        if self._ended and not (scanner.done or scanner.failed or self._text.startswith(stops, self._at)):
            self._at = len(self._text)
            self.drop()
        return scanner.done

    def _scan(self, give: Callable[[str], None], stops: tuple[str, ...]) -> Steps[LenientJson]:
        scanner = LenientJson(stops)
        while True:
            self._at = scanner.scan(self._text, self._at)
            if text := scanner.take():
                give(text)
            if scanner.done or scanner.failed or not (yield from self.more()):
                return scanner


class _Search:
    """For the first of several literals; of those that begin at one place, the longest."""

    def __init__(self, literals: tuple[str, ...]) -> None:
        ordered = sorted(literals, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)))
        self._begun = frozenset(each[:end] for each in literals for end in range(1, len(each)))
        self._longest = max(map(len, literals)) - 1

    def next(self, text: str, at: int, final: bool) -> tuple[str, str]:
        """Text from a place on that is certain not to hold a literal, and the literal behind it, empty if there is
        none for certain. `final` is for text that will not go on."""
        match = self._pattern.search(text, at)
        if final:
            return (text[at:], "") if match is None else (text[at : match.start()], match.group())
        size = len(text)
        end = size if match is None else match.start()
        for start in range(max(size - self._longest, at), min(end + 1, size)):
            if text[start:] in self._begun:
                return text[at:start], ""
        return (text[at:], "") if match is None else (text[at:end], match.group())


@cache
def _search(literals: tuple[str, ...]) -> _Search:
    return _Search(literals)


@cache
def _word(also: str) -> re.Pattern[str]:
    return re.compile(rf"(?:[^\W_]|[{re.escape(also)}])*")
