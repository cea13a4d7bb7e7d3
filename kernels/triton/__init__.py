"""Triton kernels for CUDA devices. Importing this imports no Triton: `library` does, at first use."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType


@cache
def library() -> ModuleType | None:
    """The kernels, `mla_attention` and `experts`; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from kernels.triton import functions

    return functions


__all__ = ["library"]
