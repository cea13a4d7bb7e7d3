"""Reasoning of Qwen's models."""

from __future__ import annotations

from actors.ingress.parsers.reasoning.tags import TaggedReasoning


class QwenReasoning(TaggedReasoning):
    """Qwen3 writes `<think>` itself when it reasons; for the models that always do, and for later ones unless
    `enable_thinking` is off, the prompt ends with it. Some begin a tool call without leaving the reasoning."""

    INTERRUPTIONS = ("<tool_call>",)
