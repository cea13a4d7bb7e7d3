"""Reasoning of GLM's models."""

from __future__ import annotations

from actors.ingress.parsers.reasoning.tags import TaggedReasoning


class GLMReasoning(TaggedReasoning):
    """GLM-4.5 writes `<think>` itself when it reasons."""

    INTERRUPTIONS = ("<tool_call>",)
