"""Cohere's Command R7B, Command A and later."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register(
    "cohere_command4", "cohere_command3", template=lambda template: "<|START_ACTION|>" in template, rank=2
)
class CohereCalls(JSONCalls):
    """`<|START_ACTION|>` [{"tool_call_id": "0", "tool_name": "f", "parameters": {…}}, …] `<|END_ACTION|>`."""

    MARKERS = ("<|START_ACTION|>",)
    ENDS = ("<|END_ACTION|>",)
