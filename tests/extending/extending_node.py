"""A node that serves with packages from outside of the tree."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

from extending_packages import ROOT


class Node:
    """A node of `runtime up --detach`. Packages in `directory` are installed for it; so is its run directory there."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        paths = os.pathsep.join((str(ROOT / "src"), str(directory)))
        self.environment = {**os.environ, "RUNTIME_DIR": str(directory / "run"), "PYTHONPATH": paths}
        self.environment.pop("RUNTIME_API_KEY", None)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `runtime` command."""
        command = [sys.executable, "-m", "llm_runtime", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=150)

    @contextmanager
    def up(self, topology: Path, *settings: str) -> Iterator[None]:
        """Serves a topology."""
        sets = [part for setting in ("node.name=x", *settings) for part in ("--set", setting)]
        started = self.run("up", str(topology), "--port", str(self.port), "--detach", *sets)
        assert started.returncode == 0, started.stdout + started.stderr
        try:
            yield
        finally:
            self.run("down", "--node", "x")

    def open(self, path: str, body: Any = None) -> HTTPResponse:
        """The answer to a request, whose body is JSON."""
        url = f"http://127.0.0.1:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        answer: HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=150
        )
        return answer

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer to a JSON request that must succeed."""
        with self.open(path, body) as answer:
            return json.load(answer)

    def figure(self, name: str) -> float:
        """A figure of the engine's scheduler, as it reports it once a second."""
        with self.open("/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
