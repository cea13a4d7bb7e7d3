"""Formats of tool calls, each in a file of its own, by the names that SGLang and vLLM give them."""

from __future__ import annotations

from llm_runtime.actors.parsers.events import Parser
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser, Tools
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS as FORMATS

FORMATS.load(__name__, __path__)

TOOL_CALL_FORMATS = FORMATS.formats


def tool_call_format(name: str) -> type[ToolCallParser]:
    """The class of a format."""
    return FORMATS.get(name)


def tool_call_parser(name: str, tools: Tools) -> Parser:
    """A parser for one output of a model that may call tools."""
    return FORMATS.get(name)(tools)


def detect_tool_calls(template: str) -> str | None:
    """The format in which a chat template shows tool calls to the model; None if it shows none that is known."""
    return FORMATS.detect(template)
