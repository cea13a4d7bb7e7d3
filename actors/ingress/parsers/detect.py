"""Which formats a model uses, as far as its chat template tells."""

from __future__ import annotations

import re

from actors.ingress.parsers.reasoning import ReasoningFormat
from actors.ingress.parsers.tool_calls import ToolCallFormat

_CALLS: tuple[tuple[str, ToolCallFormat], ...] = (
    ("｜DSML｜", "deepseekv32"),
    ("<arg_key>", "glm45"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "qwen25"),
    ("<|python_tag|>", "llama3"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(params_name1=params_value1", "pythonic"),
)
_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
_ENDS_IN_REASONING = re.compile(r"add_generation_prompt.*<think>(?:\\n)?['\"]\s*-?\}\}", re.DOTALL)


def detect_tool_calls(template: str) -> ToolCallFormat | None:
    """The format in which a template shows tool calls to the model; None if it shows none that is known."""
    if _DEEPSEEK_CALL in template and "｜DSML｜" not in template:
        return "deepseekv3" if "```json" in template else "deepseekv31"
    return next((name for mark, name in _CALLS if mark in template), None)


def detect_reasoning(template: str) -> ReasoningFormat | None:
    """The format of the reasoning that a template has in mind; None if it has none that is known."""
    if "<think>" not in template and "</think>" not in template:
        return None
    if "<｜Assistant｜>" in template:
        return "deepseek-v3" if re.search(r"\bthinking\b", template) else "deepseek-r1"
    glm = "[gMASK]" in template
    if glm or "<|im_start|>" in template:
        if _ENDS_IN_REASONING.search(template):
            return "qwen3-thinking"
        if "enable_thinking" in template:
            return "glm45" if glm else "qwen3"
    return None
