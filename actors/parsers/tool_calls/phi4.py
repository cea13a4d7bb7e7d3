"""Phi-4-mini."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register(
    "phi4_mini_json", template=lambda template: "<|tool|>" in template and "<|/tool|>" in template, rank=1
)
class Phi4Calls(JSONCalls):
    """`functools[` {"name": "f", "arguments": {…}}, … `]`, or the list between `<|tool_call|>` and `<|/tool_call|>`."""

    MARKERS = ("functools[", "<|tool_call|>")
    ENDS = ("<|/tool_call|>",)
