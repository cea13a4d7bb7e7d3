"""Jamba."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("jamba", template=lambda template: "<tool_calls>" in template)
class JambaCalls(JSONCalls):
    """`<tool_calls>` [{"name": "f", "arguments": {…}}, …] `</tool_calls>`."""

    MARKERS = ("<tool_calls>",)
    ENDS = ("</tool_calls>",)
