"""`kill -9` of an ingress worker: its clients notice nothing but a pause."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.ingress.journal import slot_bytes

from .conftest import ROOT, listen, wait_for
from .fakes import EOS, MODEL, VOCAB_SIZE, Fakes, answer

TOKENS = 400
MAX_BODY = 2**20
SLOTS = 64


class Tree:
    """Ingress workers below a supervisor, with fake peers."""

    def __init__(self, directory: Path, workers: int = 1, slots: int = SLOTS, **config: Any) -> None:
        names = [f"ingress{i}" for i in range(workers)]
        self.fakes = Fakes(directory, names)
        self.fakes.start()
        self._listener = listen()
        self.port: int = self._listener.getsockname()[1]
        settings = {
            "model": MODEL,
            "served_model_names": ["fake"],
            "max_model_len": 2**20,
            "vocab_size": VOCAB_SIZE,
            "eos_token_ids": [EOS],
            "request_timeout_s": 60,
            "stall_s": 0.5,
            "max_body_bytes": MAX_BODY,
            **config,
        }
        peers = {each: self.fakes.address(each) for each in ("bootstrap", "tokenizer", "detokenizer")}
        peers[self.fakes.scheduler] = self.fakes.address(self.fakes.scheduler)
        arguments = {
            "run_dir": str(directory),
            "workers": [
                [
                    name,
                    {
                        "address": self.fakes.address(name),
                        "peers": peers | {each: self.fakes.address(each) for each in names if each != name},
                        "config": settings,
                    },
                ]
                for name in names
            ],
            "descriptors": {"listener": self._listener.fileno()},
            "journal_bytes": slots * slot_bytes(MAX_BODY),
        }
        self.directory = directory
        self.pids: dict[str, int] = {}
        self.ready: dict[str, int] = {}
        self.gave_up = False
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/ingress/supervised.py"), json.dumps(arguments)],
            pass_fds=[self._listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: len(self.ready) == workers, "ready workers")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, name, pid, incarnation = line.split()
            if kind == "ready":
                self.pids[name] = int(pid)
                self.ready[name] = int(incarnation)
            elif kind == "gave_up":
                self.gave_up = True

    def kill(self, name: str = "ingress0", wait: bool = True) -> None:
        """Kills a worker, and waits until the next incarnation is ready."""
        before = self.ready[name]
        os.kill(self.pids[name], signal.SIGKILL)
        if wait:
            wait_for(lambda: self.ready[name] > before, "restart")

    def connect(self) -> socket.socket:
        """A client's connection."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(30)
        return connection

    def figure(self, name: str, actor: str = "ingress0") -> float:
        """A figure of /metrics."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.search(rf'^runtime:{name}{{actor="{actor}",model_name="fake"}} (\S+)$', text, re.M)
        assert found is not None, (name, text)
        return float(found[1])

    def log(self) -> str:
        """What the workers have logged."""
        return "".join(path.read_text() for path in (self.directory / "logs").glob("ingress*.log"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.fakes.stop()
            self._listener.close()
        assert not self.fakes.seen.wrong
        assert not self.gave_up


Grow = Callable[..., Tree]


@pytest.fixture
def grow(tmp_path: Path) -> Iterator[Grow]:
    """Starts ingress workers under supervision."""
    trees: list[Tree] = []

    def start(**arguments: Any) -> Tree:
        trees.append(Tree(tmp_path, **arguments))
        return trees[-1]

    yield start
    for tree in trees:
        tree.close()


def request(path: str = "/v1/completions", **fields: Any) -> bytes:
    """A whole request."""
    body = json.dumps({"seed": 1, "max_tokens": TOKENS, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Response:
    """An HTTP response, read strictly: every byte must be where it belongs."""

    def __init__(self, file: Any) -> None:
        status = file.readline()
        assert status.startswith(b"HTTP/1.1 "), status
        self.status = int(status.split()[1])
        self.headers: dict[str, str] = {}
        while (line := file.readline()) != b"\r\n":
            name, _, value = line.decode().partition(": ")
            assert name not in self.headers
            self.headers[name] = value.strip()
        if self.headers.get("transfer-encoding") == "chunked":
            self.chunks = list(self._chunks(file))
            self.body = b"".join(self.chunks)
        else:
            self.body = file.read(int(self.headers["content-length"]))

    @staticmethod
    def _chunks(file: Any) -> Iterator[bytes]:
        while size := int(file.readline(), 16):
            yield file.read(size)
            assert file.read(2) == b"\r\n"
        assert file.read(2) == b"\r\n"

    @property
    def events(self) -> list[dict[str, Any]]:
        """The documents of a whole stream."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def text(self, choice: int = 0) -> str:
        """The text of a completion, streamed or not."""
        documents = self.events if "text/event-stream" in self.headers["content-type"] else [self.json]
        identities = {document["id"] for document in documents}
        assert len(identities) == 1
        assert len({document["created"] for document in documents}) == 1
        choices = [each for document in documents for each in document["choices"] if each["index"] == choice]
        finishes = [each["finish_reason"] for each in choices if each["finish_reason"] is not None]
        assert finishes == ["length"]
        return "".join(
            each["text"] if "text" in each else (each.get("delta") or each.get("message")).get("content", "")
            for each in choices
        )


def killer(tree: Tree, times: int, most_s: float, name: str = "ingress0") -> threading.Thread:
    """Kills a worker again and again, at random moments after it was ready."""
    chance = random.Random(times)

    def run() -> None:
        for _ in range(times):
            time.sleep(chance.random() * most_s)
            tree.kill(name)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_stream_survives_many_kills(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.005
    with tree.connect() as connection, connection.makefile("rb") as file:
        thread = killer(tree, 20, 0.06)
        connection.sendall(request(prompt="a", stream=True))
        response = Response(file)
        thread.join()
        assert response.text() == answer("a", 1, TOKENS)
        attempts = [each.attempt for each in tree.fakes.seen.generates]
        assert attempts == sorted(set(attempts))
        assert len({each.rid for each in tree.fakes.seen.generates}) == 1
        assert any(each.output for each in tree.fakes.seen.generates)
