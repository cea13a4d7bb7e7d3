"""Times as Anthropic and Ollama write them."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(seconds: int) -> str:
    """Seconds since 1970 as a date and time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
