"""Compiles the CPU kernels before any rank needs them: the first start on a machine takes a minute, and says so."""

from __future__ import annotations

from collections.abc import Callable

from llm_runtime.kernels.cpu import BuildError, build, choice


def compile_kernels(progress: Callable[[int, int], None]) -> str:
    """Compiles what ranks on the CPU need, if it is not there.

    Args:
        progress: told how many of how many files are compiled.

    Returns why that is not possible, empty if it is. Ranks compute in plain torch then.
    """
    try:
        backend = choice()
    except ValueError:
        return ""  # the rank says what is wrong with the variable
    if backend == "torch":
        return ""
    try:
        build(backend, progress)
    except BuildError as error:
        return str(error)
    return ""
