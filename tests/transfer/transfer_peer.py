"""One end of a transfer as a process of its own, and the test's handle of it.

As a program (`python transfer_peer.py SPEC`) it makes an engine, registers its arenas, and obeys one command a line.
SPEC is JSON: settings; arenas and sources as {name: descriptor}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_runtime.transport import Arena
from llm_runtime.transport.transfer import (
    Piece,
    Region,
    TransferSettings,
    TransferStuck,
    TransferUnavailable,
    create_engine,
)

DEADLINE_S = 30.0
STUCK = "stuck"
MARK = "peer: "
"""Before what the process has to say: libraries print too."""


# -- the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    spec = json.loads(sys.argv[1])
    regions = [Region(name, Arena(descriptor).buffer) for name, descriptor in spec["arenas"].items()]
    sources = {name: Arena(descriptor, private=True).buffer for name, descriptor in spec["sources"].items()}
    try:
        engine = create_engine(TransferSettings(**spec["settings"]), sources)
        engine.register(regions)
    except TransferUnavailable as error:
        say("unavailable", str(error))
        return
    say("ready", engine.endpoint().hex())
    ended: dict[int, str] = {}
    poller = select.poll()
    poller.register(engine.fileno(), select.POLLIN)
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "read":
                pieces = [Piece(*piece) for piece in command["pieces"]]
                say(engine.read(bytes.fromhex(command["endpoint"]), pieces))
            case "cancel":
                engine.cancel(command["handle"])
                say("")
            case "wait":  # for the handles; their errors, or what has stuck
                deadline = time.monotonic() + DEADLINE_S
                try:
                    while not set(command["handles"]) <= set(ended):
                        for handle, error in engine.poll():
                            assert handle not in ended
                            ended[handle] = error
                        if time.monotonic() > deadline:
                            break
                        poller.poll(200)
                except TransferStuck:
                    say(STUCK)
                    os._exit(1)  # as an actor's process would end
                say([ended.get(handle, "never ended") for handle in command["handles"]])
            case "close":
                engine.close()
                say("")
                os._exit(0)  # as an actor's process ends: what libraries do at an interpreter's end is left out


def say(*words: Any) -> None:
    print(MARK + json.dumps(words), flush=True)


# -- the test's side -----------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """The engine cannot be used here: a reason to skip a test."""


class Peer:
    """A process with an engine, and the memory that it has registered, mapped by the test too."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        arenas: Mapping[str, int],
        sources: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arenas = {name: Arena(descriptor) for name, descriptor in arenas.items()}
        self.memory = [np.frombuffer(arena.buffer, np.uint8) for arena in self.arenas.values()]
        spec = {"settings": dict(settings), "arenas": dict(arenas), "sources": dict(sources or {})}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[*arenas.values(), *(sources or {}).values()],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **(environment or {})},
        )
        word, self.endpoint = self.hear()
        if word == "unavailable":
            self.kill()
            raise Unavailable(self.endpoint)

    def hear(self) -> Any:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            assert line, f"the process has ended with {self.process.wait()}"
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))

    def ask(self, do: str, **more: Any) -> Any:
        self.tell(do, **more)
        (answer,) = self.hear()
        return answer

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()

    def read(self, peer: Peer | str, pieces: Sequence[Sequence[int]]) -> int:
        """Starts to read from a peer, or from its former endpoint."""
        endpoint = peer if isinstance(peer, str) else peer.endpoint
        handle: int = self.ask("read", endpoint=endpoint, pieces=[list(piece) for piece in pieces])
        return handle

    def wait(self, *handles: int) -> Any:
        """The error of each read, "" for none; or `STUCK`, and the process is gone."""
        return self.ask("wait", handles=handles)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


if __name__ == "__main__":
    main()
