"""Reasoning between `<think>` and `</think>`."""

from __future__ import annotations

import re

from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.reasoning.registry import FORMATS


def _thinks(template: str) -> bool:
    return "<think>" in template or "</think>" in template


@FORMATS.register(
    "deepseek-r1",
    "deepseek_r1",
    template=lambda template: _thinks(template) and "<｜Assistant｜>" in template,
)
class DeepSeekR1Reasoning(ReasoningParser):
    """DeepSeek-R1 always reasons, and does not always write the first tag."""

    ALWAYS = True


@FORMATS.register(
    "deepseek-v3",
    "deepseek-v4",
    "deepseek_v3",
    "deepseek_v4",
    template=lambda template: (
        _thinks(template) and "<｜Assistant｜>" in template and bool(re.search(r"\bthinking\b", template))
    ),
    rank=1,
)
class DeepSeekReasoning(ReasoningParser):
    """DeepSeek-V3.1 and later reason when the prompt ends with the first tag."""

    CLOSING = "</think>"


@FORMATS.register("glm45", "glm47", template=lambda template: _thinks(template) and "[gMASK]" in template)
class GLMReasoning(ReasoningParser):
    """GLM-4.5 and later write both tags themselves, or only the second one."""

    CLOSING = "</think>\n"
    CALLS = ("<tool_call>",)


@FORMATS.register(
    "qwen3",
    "interns1",
    "mimo",
    "nemotron_3",
    "nemotron_v3",
    "qwen3-thinking",
    "step3p5",
    template=_thinks,
    rank=-1,
)
class QwenReasoning(ReasoningParser):
    """Qwen3 writes both tags itself when it reasons; where it always does, the prompt ends with the first."""

    CALLS = ("<tool_call>",)


@FORMATS.register("kimi_k2", template=lambda template: _thinks(template) and "<|tool_calls_section_begin|>" in template)
class KimiK2Reasoning(ReasoningParser):
    """Kimi-K2-Thinking."""

    CLOSING = "</think>"
    CALLS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>", "<|tool_call_begin|>")


@FORMATS.register(
    "minimax", "minimax-m2", "minimax_m2", template=lambda template: _thinks(template) and "minimax:" in template
)
class MiniMaxReasoning(ReasoningParser):
    """MiniMax-M2, whose prompt ends with the first tag."""

    CALLS = ("<minimax:tool_call>",)


@FORMATS.register(
    "olmo3",
    template=lambda template: _thinks(template) and "<function_calls>" in template and "<functions>" in template,
)
class OLMoReasoning(ReasoningParser):
    """OLMo 3, whose prompt may end with the first tag."""

    CLOSING = "</think>"


@FORMATS.register("step3", template=lambda template: _thinks(template) and "steptml" in template)
class StepReasoning(ReasoningParser):
    """Step 3 always reasons."""

    ALWAYS = True
    CALLS = ("<｜tool_calls_begin｜>",)


@FORMATS.register("ernie45", template=lambda template: _thinks(template) and "<response>" in template)
class ErnieReasoning(ReasoningParser):
    """ERNIE 4.5, whose answer stands between `<response>` and `</response>` if it calls no tool."""

    CLOSING = "\n</think>\n\n"
    ANSWER = (("<response>", "</response>"),)


@FORMATS.register(
    "hunyuan",
    "hunyuan_a13b",
    "hy_v3",
    template=lambda template: _thinks(template) and ("<answer>" in template or "<tool_sep>" in template),
)
class HunyuanReasoning(ReasoningParser):
    """Hunyuan, which may put its answer between `<answer>` and `</answer>`."""

    CALLS = ("<tool_calls>",)
    ANSWER = (("<answer>", "</answer>"),)
