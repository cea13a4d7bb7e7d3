"""One ingress with a scripted model for the official clients of several protocols."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package `ingress` with the fakes

from ingress.conftest import Served, one_ingress


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), tool_call_parser="qwen25", reasoning_parser="qwen3") as served:
        served.fakes.per_step = 3
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The server, whose model says what `served.fakes.script` has it say for the time of a test."""
    yield server
    server.fakes.script = None
