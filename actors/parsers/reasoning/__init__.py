"""Formats of reasoning, each declared once, by the names that SGLang and vLLM give them."""

from __future__ import annotations

from typing import NamedTuple

from llm_runtime.actors.parsers.events import Parser
from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.reasoning.registry import FORMATS as FORMATS

FORMATS.load(__name__, __path__)

REASONING_FORMATS = FORMATS.formats


class Markers(NamedTuple):
    """The texts around the reasoning of an output.

    Attributes:
        start: with which it begins; empty if the output begins inside. ends: any of which ends it.
        closing: what a model writes to end it.
    """

    start: str
    ends: list[str]
    closing: str


def reasoning_format(name: str) -> type[ReasoningParser]:
    """The class of a format."""
    return FORMATS.get(name)


def reasoning_parser(name: str, inside: bool) -> Parser:
    """A parser for one output. `inside` says whether this begins inside the reasoning."""
    return FORMATS.get(name)(inside)


def reasoning_markers(name: str, inside: bool) -> Markers:
    """What the parser of an output goes by."""
    kind = FORMATS.get(name)
    return Markers("" if inside else kind.OPEN, [kind.CLOSE], kind.CLOSING)


def markers_after(name: str, prompt: str) -> Markers:
    """The same for an output that goes on with any text."""
    return reasoning_markers(name, FORMATS.get(name).goes_on_inside(prompt))


def detect_reasoning(template: str) -> str | None:
    """The format of the reasoning that a chat template has in mind; None if it has none that is known."""
    return FORMATS.detect(template)
