"""DeepSeek V3.2 and V4."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.invoke_calls import InvokeCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register(
    "deepseekv32", "deepseek_v32", "deepseek_v4", "deepseekv4", template=lambda template: "｜DSML｜" in template, rank=2
)
class DSMLCalls(InvokeCalls):
    """DeepSeek's markup language, in which parameters say with `string="true"` or "false" whether they are strings. The
    section is named `function_calls` by V3.2, `tool_calls` by V4."""

    PREFIX = "｜DSML｜"
    SECTIONS = ("｜DSML｜function_calls", "｜DSML｜tool_calls", "function_calls", "tool_calls")
