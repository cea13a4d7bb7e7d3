"""Reasoning of DeepSeek's models."""

from __future__ import annotations

from actors.ingress.parsers.reasoning.tags import TaggedReasoning


class DeepSeekReasoning(TaggedReasoning):
    """DeepSeek-R1 always reasons; DeepSeek-V3.1 and later do when `thinking` is on, and their prompt then ends with
    `<think>`."""
