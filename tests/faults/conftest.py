"""Nodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults_tools import DisturbedNode


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DisturbedNode]:
    """A node that all tests of a module disturb, with the settings that the module's `NODE` names."""
    made = DisturbedNode(tmp_path_factory.mktemp("f"), *getattr(request.module, "NODE", ()))
    try:
        yield made.up()
    finally:
        made.close()


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[Callable[..., DisturbedNode]]:
    """Starts a node of a test's own; does not wait for it."""
    made: list[DisturbedNode] = []

    def start(*settings: str, topology: str = "smollm2.toml") -> DisturbedNode:
        made.append(DisturbedNode(tmp_path, *settings, topology=topology))
        return made[-1]

    yield start
    for each in made:
        each.close()
