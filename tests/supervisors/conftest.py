"""Runs supervision trees in processes of their own, and makes sure that nothing of them is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from supervised_tools import Node, alive
from support import eventually

from llm_runtime.supervisors import ChildSpec, SupervisorSpec


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """start_node(*children, descriptors={}, files=(), program="", **fields of SupervisorSpec) runs a root with these
    children.

    `files` are created in its run directory first, and upgraded.py with the source `program`, which it imports. When
    the test ends, the tree is killed and no process may be left.
    """
    nodes: list[Node] = []

    def start(
        *children: ChildSpec,
        descriptors: dict[str, int] | None = None,
        files: Sequence[str] = (),
        program: str = "",
        **fields: Any,
    ) -> Node:
        run_dir = tmp_path / f"node{len(nodes)}"
        run_dir.mkdir()
        for name in files:
            (run_dir / name).touch()
        if program:
            (run_dir / "upgraded.py").write_text(program)
        nodes.append(Node(SupervisorSpec(children=children, **fields), run_dir, descriptors or {}))
        return nodes[-1]

    yield start
    for node in nodes:
        node.close()
    left = {pid for node in nodes for pid in node.pids}
    eventually(lambda: not any(alive(pid) for pid in left), "the end of all processes")
