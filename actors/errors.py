"""What actors refuse to start for."""

from __future__ import annotations


class StartFailure(Exception):
    """The actor cannot start, and trying again would not help. The text is one sentence that says what to do."""
