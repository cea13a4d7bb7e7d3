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
    the output begins inside it."""

    parser: type[TaggedReasoning]
    reasons: Callable[[_Arguments], bool]
    inside: Callable[[_Arguments], bool]


_FORMATS: dict[ReasoningFormat, _Format] = {
    "deepseek-r1": _Format(DeepSeekReasoning, _always, _always),
    "deepseek-v3": _Format(DeepSeekReasoning, _thinking, _always),
    "glm45": _Format(GLMReasoning, _always, _never),
    "qwen3": _Format(QwenReasoning, _always, _never),
    "qwen3-thinking": _Format(QwenReasoning, _always, _not_off),
}


def reasoning_parser(name: ReasoningFormat, arguments: _Arguments, continued: str | None = None) -> Parser | None:
    """A parser for one output; None if it holds no reasoning.

    Args:
        arguments: what the request gives to the chat template.
        continued: the text that the output goes on with, if the prompt ends with an unfinished answer.
    """
    kind = _FORMATS[name]
    if not kind.reasons(arguments):
        return None
    if continued is not None:
        return kind.parser(continued.rfind(kind.parser.OPEN) > continued.rfind(kind.parser.CLOSE))
    return kind.parser(kind.inside(arguments))
