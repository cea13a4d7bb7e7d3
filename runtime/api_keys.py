"""API keys in the environment, for the server and for its clients."""

from __future__ import annotations

import os
import re

from llm_runtime.runtime.errors import UserError

KEY = r"^[!-~]+$"
"""What every client can send in a header."""


def key_from(variable: str) -> str | None:
    """A key in the environment, None if there is none. Blanks and line ends around it come from files; no client can
    send them. Raises UserError for one that not every client can send."""
    key = os.environ.get(variable, "").strip()
    if key and not re.match(KEY, key):
        raise UserError(f"${variable} must be a key of visible ASCII characters, without blanks.")
    return key or None
