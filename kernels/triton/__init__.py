"""Triton kernels for CUDA devices. Importing this imports no Triton: `library` does, at first use."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


@cache
def library() -> ModuleType | None:
    """The kernels, under the names that operations have in `kernels`; None where Triton is not installed."""
    return import_module("llm_runtime.kernels.triton.functions") if find_spec("triton") else None


__all__ = ["library"]
