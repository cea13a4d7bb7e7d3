"""Models of other packages, found by entry points.

A package names its models in the group `llm_runtime.models`, each under the architecture that `config.json` states, as
a class in the manner of `actors.rank.models.Llama`. Its attribute `reads_as` is an architecture of this runtime: that
one's configuration and tensors are what the checkpoint has, and what the class is given.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "llm_runtime.models"


def plugin(architecture: str) -> Any:
    """The class of another package for an architecture; None if there is none.

    Raises ImportError or AttributeError if a package names one and does not have it.
    """
    found: tuple[EntryPoint, ...] = tuple(entry_points(group=GROUP, name=architecture))
    return found[0].load() if found else None
