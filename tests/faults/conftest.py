"""Nodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults_tools import Node


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that all tests of a module disturb, with the settings that the module's `NODE` names."""
    made = Node(tmp_path_factory.mktemp("f"), *getattr(request.module, "NODE", ()))
    try:
        yield made.up()
    finally:
        made.close()


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node of a test's own; does not wait for it."""
    made: list[Node] = []

    def start(*settings: str, topology: str = "smollm2.toml") -> Node:
        made.append(Node(tmp_path, *settings, topology=topology))
        return made[-1]

    yield start
    for each in made:
        each.close()
