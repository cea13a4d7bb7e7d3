"""Hermes 2 Pro and later, Qwen2.5, Qwen3, Granite 4 and ERNIE 4.5."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register(
    "qwen25", "ernie45", "granite4", "hermes", "qwen", template=lambda template: "<tool_call>" in template, rank=-1
)
class HermesCalls(JSONCalls):
    """`<tool_call>` {"name": "f", "arguments": {…}} `</tool_call>`, one pair of tags for each call."""

    MARKERS = ("<tool_call>",)
    ENDS = ("</tool_call>",)
