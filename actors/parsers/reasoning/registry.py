"""All formats of reasoning."""

from __future__ import annotations

from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.registry import Formats

FORMATS: Formats[ReasoningParser] = Formats(
    "reasoning format", "llm_runtime.reasoning_formats", "inside", ReasoningParser
)
