"""MiniMax M2."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.invoke_calls import InvokeCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS


@FORMATS.register("minimax-m2", "minimax_m2", template=lambda template: "<minimax:tool_call>" in template, rank=2)
class MiniMaxCalls(InvokeCalls):
    """`<minimax:tool_call>`, and in it `<invoke name="f">` with `<parameter name="k">`."""

    SECTIONS = ("minimax:tool_call",)
    NEWLINES = True
