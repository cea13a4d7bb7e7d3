"""Loads the C++ kernels, once a process and at first use: importing this starts nothing."""

import ctypes
import os
import warnings
from functools import cache

from llm_runtime.kernels.cpu.compile import BuildError, build, instruction_sets

CHOICES = ("torch", "avx2", "avx512")

FUNCTIONS = (
    "attention",
    "linear",
    "linear_quantized",
    "quantize_int4",
    "mla_attention",
    "linear_heads",
    "route_experts",
    "experts",
    "embedding",
    "embedding_quantized",
    "rms_norm",
    "silu_and_mul",
    "widen",
    "graph",
    "counter_uniform",
    "argmax",
    "sample",
    "logprobs",
    "apply_penalties",
    "add_bias",
)


@cache
def choice() -> str:
    """The backend that LLM_RUNTIME_KERNELS or the processor asks for: "avx512", "avx2" or "torch".

    Raises ValueError if the variable names no backend, or one this processor cannot run.
    """
    available = instruction_sets()
    wanted = os.environ.get("LLM_RUNTIME_KERNELS")
    if not wanted:
        return available[0] if available else "torch"
    if wanted not in CHOICES:
        raise ValueError(f"LLM_RUNTIME_KERNELS is {wanted!r}: use one of {', '.join(CHOICES)}, or leave it unset")
    if wanted != "torch" and wanted not in available:
        raise ValueError(f"LLM_RUNTIME_KERNELS is {wanted!r}, but this processor has no such instructions: use torch")
    return wanted


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, built and loaded; None, after one warning, if that fails, and without one if torch was chosen."""
    if choice() == "torch":
        return None
    try:
        loaded = ctypes.CDLL(str(build(choice())))
    except (BuildError, OSError) as error:
        warnings.warn(f"the C++ kernels are not used, everything runs in plain torch: {error}", stacklevel=2)
        return None
    # Each takes a struct, packed as bytes: ctypes converts one argument faster than twenty.
    for name in FUNCTIONS:
        function = getattr(loaded, name)
        function.argtypes = (ctypes.c_char_p,)
        function.restype = ctypes.c_int
    return loaded
