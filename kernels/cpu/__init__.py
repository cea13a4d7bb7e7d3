"""The C++ kernels for CPU tensors: built with the system's compiler on first use and cached.

`build()` builds them ahead of time. A missing or failing compiler leaves everything to plain torch, after one warning.
"""

from llm_runtime.kernels.cpu.compile import INSTRUCTION_SETS, BuildError, build, instruction_sets
from llm_runtime.kernels.cpu.load import choice, library

__all__ = ["INSTRUCTION_SETS", "BuildError", "build", "choice", "instruction_sets", "library"]
