"""Reasoning formats, by the names that SGLang gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from actors.ingress.parsers.events import Parser
from actors.ingress.parsers.reasoning.deepseek import DeepSeekReasoning
from actors.ingress.parsers.reasoning.glm import GLMReasoning
from actors.ingress.parsers.reasoning.qwen import QwenReasoning
from actors.ingress.parsers.reasoning.tags import TaggedReasoning

ReasoningFormat = Literal["deepseek-r1", "deepseek-v3", "glm45", "qwen3", "qwen3-thinking"]
REASONING_FORMATS: tuple[ReasoningFormat, ...] = get_args(ReasoningFormat)

_Arguments = Mapping[str, Any]


def _thinking(arguments: _Arguments) -> bool:
    return bool(arguments.get("thinking"))


def _not_off(arguments: _Arguments) -> bool:
    return arguments.get("enable_thinking") is not False


def _always(arguments: _Arguments) -> bool:
    return True


def _never(arguments: _Arguments) -> bool:
    return False


class _Format(NamedTuple):
    """A format: its parser, and what a request's template arguments say, whether there is reasoning at all and whether
    the output begins inside it. `closing` is how models write its end, with the white space around the tag."""

    parser: type[TaggedReasoning]
    reasons: Callable[[_Arguments], bool]
    inside: Callable[[_Arguments], bool]
    closing: str


_FORMATS: dict[ReasoningFormat, _Format] = {
    "deepseek-r1": _Format(DeepSeekReasoning, _always, _always, "\n</think>\n\n"),
    "deepseek-v3": _Format(DeepSeekReasoning, _thinking, _always, "</think>"),
    "glm45": _Format(GLMReasoning, _always, _never, "</think>\n"),
    "qwen3": _Format(QwenReasoning, _always, _never, "\n</think>\n\n"),
    "qwen3-thinking": _Format(QwenReasoning, _always, _not_off, "\n</think>\n\n"),
}


class Markers(NamedTuple):
    """The texts around the reasoning of an output.

    Attributes:
        start: with which it begins; empty if the output begins inside. ends: any of which ends it.
        closing: what a model writes to end it.
    """

    start: str
    ends: list[str]
    closing: str


def reasoning_parser(name: ReasoningFormat, arguments: _Arguments, continued: str | None = None) -> Parser | None:
    """A parser for one output; None if it holds no reasoning.

    Args:
        arguments: what the request gives to the chat template.
        continued: the text that the output goes on with, if the prompt ends with an unfinished answer.
    """
    inside = _begins_inside(name, arguments, continued)
    return None if inside is None else _FORMATS[name].parser(inside)


def reasoning_markers(name: ReasoningFormat, arguments: _Arguments, continued: str | None = None) -> Markers | None:
    """What the parser of an output goes by; None if it holds no reasoning. Arguments as those of `reasoning_parser`."""
    inside = _begins_inside(name, arguments, continued)
    return None if inside is None else _markers(_FORMATS[name], inside)


def markers_after(name: ReasoningFormat, prompt: str) -> Markers:
    """The same for an output that goes on with any text."""
    kind = _FORMATS[name]
    return _markers(kind, _ends_inside(kind, prompt))


def _begins_inside(name: ReasoningFormat, arguments: _Arguments, continued: str | None) -> bool | None:
    """Whether an output begins inside its reasoning; None if it holds none."""
    kind = _FORMATS[name]
    if not kind.reasons(arguments):
        return None
    return kind.inside(arguments) if continued is None else _ends_inside(kind, continued)


def _ends_inside(kind: _Format, text: str) -> bool:
    return text.rfind(kind.parser.OPEN) > text.rfind(kind.parser.CLOSE)


def _markers(kind: _Format, inside: bool) -> Markers:
    parser = kind.parser
    return Markers("" if inside else parser.OPEN, [parser.CLOSE, *parser.INTERRUPTIONS], kind.closing)
