"""One ingress with a scripted model for the official clients of several protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ingress.conftest import Served, one_ingress
from support import Node, require_model

from llm_runtime.actors.messages import Generate, Refused


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("i")
    store = {"response_dir": str(directory / "responses"), "response_store_bytes": 2**20}
    with one_ingress(directory, tool_call_parser="qwen25", reasoning_parser="qwen3", **store) as served:
        served.fakes.per_step = 3
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The server, whose model says what `served.fakes.script` has it say for the time of a test."""
    yield server
    server.fakes.script = None
    server.fakes.refuse = lambda generate: None


@pytest.fixture
def busy(served: Served) -> Callable[[int, int], None]:
    """`busy(status, times)` has the engine refuse the next requests: try again in a second."""

    def start(status: int, times: int) -> None:
        left = times

        def refuse(generate: Generate) -> Refused | None:
            nonlocal left
            left -= 1
            return Refused(generate.rid, generate.attempt, status, "Too busy.", 1.0) if left >= 0 else None

        served.fakes.refuse = refuse

    return start


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a node that serves the embedded model as it comes."""
    require_model()
    with Node(tmp_path_factory.mktemp("n"), detached=True) as node:
        yield node.url
