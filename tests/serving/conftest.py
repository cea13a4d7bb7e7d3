"""Nodes and a model that tests of several modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_node import FLOAT32, start
from support import MODEL, Node, require_model

from llm_runtime import LLM


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    yield from start(tmp_path_factory.mktemp("node"), "smollm2.toml", FLOAT32, "engine.main.chunk_tokens=200")


@pytest.fixture(scope="module")
def tp2_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    yield from start(tmp_path_factory.mktemp("tp2"), "smollm2-tp2.toml", FLOAT32)


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """A model for this process."""
    require_model()
    with LLM(MODEL, kv_tokens=8192, deterministic=True) as llm:
        yield llm
