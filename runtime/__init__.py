"""The top of the house: topology files, models, the supervision tree of a node, the command line, and `LLM`, which runs
a node for one Python program.

    from runtime import LLM, SamplingParams

    with LLM("smollm2-135m-instruct") as llm:
        for result in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(result.text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.errors import UserError
    from runtime.offline.llm import LLM
    from runtime.offline.params import SamplingParams
    from runtime.offline.results import Completion, Result, TokenLogprob, Usage

__all__ = ["LLM", "Completion", "Result", "SamplingParams", "TokenLogprob", "Usage", "UserError"]

_MODULES = {
    "LLM": "runtime.offline.llm",
    "SamplingParams": "runtime.offline.params",
    "UserError": "runtime.errors",
    **dict.fromkeys(("Completion", "Result", "TokenLogprob", "Usage"), "runtime.offline.results"),
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used: commands and actors import this package without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
