"""Seed-OSS."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.qwen_coder import QwenCoderCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("seed_oss", template=lambda template: "<seed:tool_call>" in template, rank=1)
class SeedCalls(QwenCoderCalls):
    """Qwen3-Coder's format between `<seed:tool_call>` and `</seed:tool_call>`."""

    MARKERS = ("<seed:tool_call>", "<function=")
    ENDS = ("</seed:tool_call>",)
    CALL_ENDS = ("</function>", "</seed:tool_call>")
