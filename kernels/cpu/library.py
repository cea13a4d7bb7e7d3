"""Loads the C++ kernels, once a process and at first use: importing this starts nothing."""

import ctypes
import os
import warnings
from functools import cache

from kernels.cpu.build import BuildError, build, instruction_sets

CHOICES = ("torch", "avx2", "avx512")

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# Arguments of each function: see the C++ sources. Calls with many arguments take one packed struct, as bytes.
_ARGUMENTS = {
    "attention": (ctypes.c_char_p, ctypes.c_int),
    "linear": (ctypes.c_char_p, ctypes.c_int),
    "rms_norm": (*[_pointer] * 4, _int, _int, _float, _int, ctypes.c_int),
    "silu_and_mul": (_pointer, _pointer, _int, _int, _int, ctypes.c_int),
    "counter_uniform": (_pointer, _pointer, _pointer, _int),
    "argmax": (_pointer, _int, _int, _int, _pointer, _int),
    "sample": (_pointer, _int, _int, _int, *[_pointer] * 7, _int),
    "logprobs": (_pointer, _int, _int, _int, _pointer, _int, _pointer, _pointer, _pointer, _int),
    "apply_penalties": (_pointer, _int, _int, _int, _pointer, _pointer, _pointer, _int, *[_pointer] * 3),
    "add_bias": (_pointer, _int, _int, _int, *[_pointer] * 3, _int),
}
_WITHOUT_RESULT = {"rms_norm", "silu_and_mul", "counter_uniform", "argmax", "sample"}


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
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = None if name in _WITHOUT_RESULT else ctypes.c_int
    return loaded
