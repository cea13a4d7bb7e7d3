"""A real ingress in a process of its own, with fake peers in a thread of the test."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import ROOT, eventually

from llm_runtime.actors.ingress.config import ServedModel

from .fakes import EOS, MAX_MODEL_LEN, MODEL, VOCAB_SIZE, Fakes


def ingress_config(**settings: Any) -> dict[str, Any]:
    """Settings of an ingress worker that serves the fakes' model; those of a model are that one's."""
    model = {
        "model": MODEL,
        "served_model_names": ["fake", "alias"],
        "max_model_len": MAX_MODEL_LEN,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": [EOS],
        **{key: settings.pop(key) for key in ServedModel.__struct_fields__ if key in settings},
    }
    return {"models": [model], "request_timeout_s": 60, "stall_s": 0.5, **settings}


class Served:
    """A running ingress worker."""

    def __init__(self, directory: Path, fakes: Fakes, name: str, listener: socket.socket, **config: Any) -> None:
        self.fakes = fakes
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        shutdown, self._shutdown = os.pipe()
        peers = {each: fakes.address(each) for each in ("bootstrap", "tokenizer", "detokenizer", fakes.scheduler)}
        peers |= {each: fakes.address(each) for each in fakes.ingresses if each != name}
        settings = ingress_config(**config)
        arguments = {
            "id": name,
            "incarnation": 1,
            "run_dir": str(directory),
            "args": {"address": fakes.address(name), "peers": peers, "config": settings},
            "descriptors": {"listener": listener.fileno()},
            "shutdown": shutdown,
        }
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/ingress/serve.py"), json.dumps(arguments)],
                pass_fds=[listener.fileno(), shutdown],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            )
        os.close(shutdown)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def await_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == b"ready\n", line + self.log.read_bytes()
        eventually(lambda: self.client.get("/health").status_code == 200, "health")

    def request_shutdown(self) -> None:
        os.write(self._shutdown, b"x")

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._shutdown)


Serve = Callable[..., Served]


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The JSON documents of a whole stream of events, which must end with [DONE]."""
    events = [each.removeprefix("data: ") for each in text.split("\n\n") if each]
    assert events.pop() == "[DONE]"
    return [json.loads(each) for each in events]


def listen() -> socket.socket:
    """A listening socket on a free port, as the root of a node makes it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.set_inheritable(True)
    return listener


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts ingresses with fake peers of their own: `serve(workers=1, **config)` gives the first one."""
    running: list[Served] = []
    fakes_list: list[Fakes] = []
    sockets: list[socket.socket] = []

    def start(workers: int = 1, listener: socket.socket | None = None, **config: Any) -> Served:
        names = [f"ingress{i}" for i in range(workers)]
        fakes = Fakes(tmp_path, names)
        fakes.start()
        fakes_list.append(fakes)
        if listener is None:
            listener = listen()
            sockets.append(listener)
        workers_started = [Served(tmp_path, fakes, name, listener, **config) for name in names]
        running.extend(workers_started)
        for each in workers_started:
            each.await_ready()
        return workers_started[0]

    yield start
    for each in running:
        each.stop()
    for fakes in fakes_list:
        fakes.stop()
        assert not fakes.seen.wrong
    for each_socket in sockets:
        each_socket.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One ingress for the tests of a module that do no harm to it."""
    with one_ingress(tmp_path_factory.mktemp("i")) as served:
        yield served


@contextlib.contextmanager
def one_ingress(directory: Path, **config: Any) -> Iterator[Served]:
    """An ingress with fake peers of its own."""
    fakes = Fakes(directory, ["ingress0"])
    fakes.start()
    listener = listen()
    served = Served(directory, fakes, "ingress0", listener, **config)
    served.await_ready()
    yield served
    log = served.log.read_text()
    served.stop()
    fakes.stop()
    listener.close()
    assert not fakes.seen.wrong
    assert "Traceback" not in log, log
