"""xgrammar, loaded when it is first needed or, in a node, once before its processes are forked."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any


@lru_cache(maxsize=1)
def xgrammar() -> Any:
    """The module. Raises ImportError if it is not installed.

    It imports transformers for the names of tokenizers that are never used here, which takes three times as long as all
    the rest; a stand-in serves as well, for so long as the import takes.
    """
    if "transformers" in sys.modules:
        return importlib.import_module("xgrammar")
    sys.modules["transformers"] = _StandIn("transformers")
    try:
        return importlib.import_module("xgrammar")
    finally:
        del sys.modules["transformers"]


class _StandIn(ModuleType):
    """Has a class of any name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made
