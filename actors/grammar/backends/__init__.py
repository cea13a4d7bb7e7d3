"""Grammar backends by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

from llm_runtime.actors.grammar.backends.base import Backend, Compiled, Matcher
from llm_runtime.actors.grammar.tokens import Tokens
from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary

BackendName = Literal["llguidance", "xgrammar"]
INSTALL = {"llguidance": 'pip install "llguidance>=1.9,<2"', "xgrammar": "pip install xgrammar==0.2.8"}
THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
"""That fill the masks of a step. More than one where the cores are many, as beside a GPU: a mask takes some 50 µs."""


def missing(name: BackendName) -> str:
    """What is wrong with a backend that is not installed; empty if it is. Loads nothing."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return ""
    return f"{name} is not installed: {INSTALL[name]}"


def load_backend(model: Path, vocab_size: int, name: BackendName = "llguidance") -> Backend:
    """A backend for a checkpoint. Raises CheckpointError, and ImportError where it is not installed."""
    if missing(name):
        raise ImportError(missing(name))
    return _backend(_tokens(load_vocabulary(model), vocab_size), name)


@lru_cache(maxsize=8)
def _tokens(vocabulary: Vocabulary, vocab_size: int) -> Tokens:
    return Tokens(vocabulary, vocab_size)


def _backend(tokens: Tokens, name: BackendName) -> Backend:
    backend: Backend = importlib.import_module(f"llm_runtime.actors.grammar.backends.{name}").build(tokens, THREADS)
    return backend


__all__ = ["INSTALL", "Backend", "BackendName", "Compiled", "Matcher", "load_backend", "missing"]
