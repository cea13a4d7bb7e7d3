"""Calls that are the whole output, or none of it."""

from __future__ import annotations

from llm_runtime.actors.parsers.events import Content, Event, Parser


class WholeOutput:
    """Has a parser read an output that begins with a list. Any other one is content, whatever lists it holds.

    Args:
        calls: reads lists.
    """

    def __init__(self, calls: Parser) -> None:
        self._calls = calls
        self._begun = False
        self._is_list = True

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if not self._begun and (stripped := text.lstrip()):
            self._begun, self._is_list = True, stripped.startswith("[")
        if self._is_list:
            return self._calls.feed(text)
        held = self._calls.finish()
        self._calls = _Nothing()
        return [*held, Content(text)] if text else held

    def finish(self) -> list[Event]:
        """See `Parser`."""
        return self._calls.finish()


class _Nothing:
    def feed(self, text: str) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []
