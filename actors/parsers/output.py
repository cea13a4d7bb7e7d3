"""One output from its raw text to the fields of a message."""

from __future__ import annotations

from collections.abc import Iterable

from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning, merged


class OutputParser:
    """Takes the reasoning off an output, and the calls out of what is left.

    Args:
        reasoning, calls: None for outputs without them.
        stream_reasoning: reasoning is given out as it comes; otherwise at once, when it has ended.
        parallel_calls: several calls are given out; otherwise only the first.
    """

    def __init__(
        self,
        reasoning: Parser | None,
        calls: Parser | None,
        *,
        stream_reasoning: bool = True,
        parallel_calls: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._held: list[Event] | None = None if stream_reasoning else []
        self._parallel_calls = parallel_calls

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        events = [Content(text)] if self._reasoning is None else self._reasoning.feed(text)
        return self._limited(self._divided(events))

    def finish(self) -> list[Event]:
        """See `Parser`."""
        events = self._divided([] if self._reasoning is None else self._reasoning.finish())
        if self._calls is not None:
            events += self._calls.finish()
        return self._limited(events, last=True)

    def _divided(self, events: Iterable[Event]) -> list[Event]:
        """With calls taken out of the content."""
        if self._calls is None:
            return list(events)
        divided: list[Event] = []
        for event in events:
            divided += self._calls.feed(event.text) if isinstance(event, Content) else [event]
        return divided

    def _limited(self, events: list[Event], last: bool = False) -> list[Event]:
        """Without what the request does not want, or not yet."""
        if not self._parallel_calls:
            events = [each for each in events if not (isinstance(each, CallStart | CallArguments) and each.index)]
        if self._held is not None:
            self._held += [each for each in events if isinstance(each, Reasoning)]
            events = [each for each in events if not isinstance(each, Reasoning)]
            if events or last:
                events, self._held = self._held + events, []
        return merged(events)
