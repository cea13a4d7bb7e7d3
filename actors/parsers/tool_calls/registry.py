"""All formats of tool calls."""

from __future__ import annotations

from llm_runtime.actors.parsers.registry import Formats
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser

FORMATS: Formats[ToolCallParser] = Formats("tool-call format", "llm_runtime.tool_call_formats", "tools", ToolCallParser)
