"""Lines for the user."""

from __future__ import annotations

import sys


def say(text: str = "") -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


def complain(text: str) -> None:
    """An error on standard error."""
    sys.stderr.write(text + "\n")
