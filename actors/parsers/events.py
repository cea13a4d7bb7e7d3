"""What parsers find in a model's output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct


class Reasoning(Struct, frozen=True, gc=False):
    """Text of the model's reasoning."""

    text: str


class Content(Struct, frozen=True, gc=False):
    """Text of the answer."""

    text: str


class CallStart(Struct, frozen=True, gc=False):
    """A tool is called; its arguments follow. `id` is empty unless the format has ids that the model itself writes."""

    index: int
    name: str
    id: str = ""


class CallArguments(Struct, frozen=True, gc=False):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Reasoning | Content | CallStart | CallArguments


class Parser(Protocol):
    """Text in, events out. Neither method raises, whatever the text is."""

    def feed(self, text: str) -> list[Event]:
        """What is certain with more of the text."""

    def finish(self) -> list[Event]:
        """What was held back, when no more text comes."""


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind made one, and without empty ones."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        match event, last:
            case Reasoning(text=""), _:
                pass
            case Content(text=""), _:
                pass
            case CallArguments(text=""), _:
                pass
            case Reasoning(text), Reasoning(before):
                whole[-1] = Reasoning(before + text)
            case Content(text), Content(before):
                whole[-1] = Content(before + text)
            case CallArguments(index, text), CallArguments(same, before) if index == same:
                whole[-1] = CallArguments(index, before + text)
            case _:
                whole.append(event)
    return whole
