"""Reasoning between other tags."""

from __future__ import annotations

from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.reasoning.registry import FORMATS


@FORMATS.register("kimi", template=lambda template: "◁think▷" in template)
class KimiReasoning(ReasoningParser):
    """Kimi-VL-Thinking."""

    OPEN, CLOSE, CLOSING = "◁think▷", "◁/think▷", "◁/think▷"


@FORMATS.register("mistral", template=lambda template: "[THINK]" in template)
class MistralReasoning(ReasoningParser):
    """Magistral and later."""

    OPEN, CLOSE, CLOSING = "[THINK]", "[/THINK]", "[/THINK]"
    CALLS = ("[TOOL_CALLS]",)
    SPECIAL_TOKENS = True


@FORMATS.register("seed_oss", template=lambda template: "<seed:think>" in template)
class SeedReasoning(ReasoningParser):
    """Seed-OSS."""

    OPEN, CLOSE, CLOSING = "<seed:think>", "</seed:think>", "</seed:think>"
    CALLS = ("<seed:tool_call>",)
    SPECIAL_TOKENS = True


@FORMATS.register("gemma4", template=lambda template: "<|channel>" in template)
class GemmaReasoning(ReasoningParser):
    """Gemma 4, whose reasoning has a label."""

    OPEN, CLOSE, CLOSING = "<|channel>", "<channel|>", "<channel|>"
    LABELS = ("thought\n",)
    CALLS = ("<|tool_call>",)
    SPECIAL_TOKENS = True


@FORMATS.register("cohere_command4", "cohere_command3", template=lambda template: "<|START_THINKING|>" in template)
class CohereReasoning(ReasoningParser):
    """Command A and later, whose answers stand between tags as well."""

    OPEN, CLOSE, CLOSING = "<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>"
    CALLS = ("<|START_ACTION|>",)
    ANSWER = (("<|START_TEXT|>", "<|END_TEXT|>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>"))
    SPECIAL_TOKENS = True
