"""Llama Nemotron and Nemotron Nano 2. Nemotron 3 writes as Qwen3-Coder does."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("nemotron_json", "llama_nemotron_json", template=lambda template: "<TOOLCALL>" in template)
class NemotronCalls(JSONCalls):
    """`<TOOLCALL>` [{"name": "f", "arguments": {…}}, …] `</TOOLCALL>`."""

    MARKERS = ("<TOOLCALL>",)
    ENDS = ("</TOOLCALL>",)
