"""A serving runtime for language models: the command `runtime`, and `LLM`, which runs a node for one Python program.

    from llm_runtime import LLM, SamplingParams

    with LLM("smollm2-135m-instruct") as llm:
        for result in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(result.text)

Its packages are the top folders of the repository: the links beside this file make an editable installation, type
checkers and editors find them under the names that they have once installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_runtime.runtime.errors import UserError
    from llm_runtime.runtime.offline.llm import LLM
    from llm_runtime.runtime.offline.params import SamplingParams
    from llm_runtime.runtime.offline.results import Completion, Result, TokenLogprob, Usage

__all__ = ["LLM", "Completion", "Result", "SamplingParams", "TokenLogprob", "Usage", "UserError"]

_MODULES = {
    "LLM": "llm_runtime.runtime.offline.llm",
    "SamplingParams": "llm_runtime.runtime.offline.params",
    "UserError": "llm_runtime.runtime.errors",
    **dict.fromkeys(("Completion", "Result", "TokenLogprob", "Usage"), "llm_runtime.runtime.offline.results"),
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used: commands and actors import this package without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
