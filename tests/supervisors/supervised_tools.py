"""The tests' handle of a supervision tree in another process, and short forms of specifications."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
from supervised_node import Answer, Request
from support import DEADLINE_S, ROOT, eventually

from llm_runtime.supervisors import (
    ChildCounts,
    ChildInfo,
    ChildInstance,
    ChildSpec,
    Event,
    NodeStatus,
    RunResult,
    SupervisorSpec,
)

HERE = Path(__file__).parent


class Node:
    """The tests' handle of a tree that runs in another process."""

    def __init__(self, spec: SupervisorSpec, run_dir: Path, descriptors: dict[str, int]) -> None:
        self.run_dir = run_dir
        (run_dir / "spec.json").write_bytes(msgspec.json.encode(spec))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(DEADLINE_S)
        names = [f"{name}={fd}" for name, fd in descriptors.items()]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "supervised_node.py"), str(run_dir), str(theirs.fileno()), *names],
            pass_fds=[theirs.fileno(), *descriptors.values()],
            env={**os.environ, "PYTHONPATH": f"{ROOT}/src{os.pathsep}{HERE}"},
            start_new_session=True,
        )
        theirs.close()
        self.pids = {self.process.pid}
        """All processes of the tree ever seen by `everything`."""

    # Commands; those that change something return the error sentence.

    def send(self, op: str, id: str = "", **fields: Any) -> None:
        self._control.send(msgspec.json.encode(Request(op=op, id=id, **fields)))

    def answer(self) -> Answer:
        return msgspec.json.decode(self._control.recv(1 << 20), type=Answer)

    def ask(self, op: str, id: str = "", **fields: Any) -> Answer:
        self.send(op, id, **fields)
        return self.answer()

    def start(self, new: ChildSpec | ChildInstance, under: str = "") -> str:
        if isinstance(new, ChildInstance):
            return self.ask("start", instance=new, under=under).error
        return self.ask("start", new=new, under=under).error

    def terminate(self, id: str) -> str:
        return self.ask("terminate", id).error

    def restart(self, id: str, graceful: bool = True) -> str:
        return self.ask("restart", id, graceful=graceful).error

    def delete(self, id: str) -> str:
        return self.ask("delete", id).error

    def renew(self) -> str:
        return self.ask("renew").error

    # What can be seen

    def tree(self) -> NodeStatus:
        return msgspec.convert(self.ask("tree").value, NodeStatus)

    def which(self, under: str = "") -> list[ChildInfo]:
        return msgspec.convert(self.ask("which", under=under).value, list[ChildInfo])

    def count(self, under: str = "") -> ChildCounts:
        return msgspec.convert(self.ask("count", under=under).value, ChildCounts)

    def status(self, id: str) -> NodeStatus:
        return next(node for node in self.tree().walk() if node.name == id)

    def known(self, id: str) -> bool:
        return any(node.name == id for node in self.tree().walk())

    def journal(self) -> list[str]:
        """What the children noted: "id incarnation text"."""
        path = self.run_dir / "journal"
        return path.read_text().splitlines() if path.exists() else []

    def events(self, kind: str = "", id: str = "") -> list[Event]:
        path = self.run_dir / "events"
        lines = path.read_bytes().splitlines() if path.exists() else []
        events = [msgspec.json.decode(line, type=Event) for line in lines]
        return [event for event in events if kind in ("", event.kind) and id in ("", event.id)]

    def everything(self) -> set[int]:
        """Pids of all processes of the tree, zygotes included."""
        found = {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        self.pids |= found
        return found

    # Waiting

    def running(self, *ids: str, incarnation: int = 0) -> list[int]:
        """Waits until these run (in that incarnation, if given); returns their pids."""

        def look() -> list[int]:
            nodes = {node.name: node for node in self.tree().walk()}
            found = [nodes[id] for id in ids if id in nodes]
            up = [node.pid for node in found if node.state == "running" and incarnation in (0, node.incarnation)]
            return [pid for pid in up if pid] if len(up) == len(ids) else []

        return eventually(look, f"{ids} running")

    def in_state(self, id: str, state: str) -> NodeStatus:
        """Waits until `id` is in that state."""
        return eventually(lambda: node if (node := self.status(id)).state == state else None, f"{id} {state}")

    def up(self) -> NodeStatus:
        """Waits until the whole tree has started."""
        return eventually(lambda: tree if (tree := self.tree()).state == "running" else None, "the tree running")

    def ended(self) -> RunResult:
        """Waits until the root has ended by itself; its result."""
        code = self.process.wait(DEADLINE_S)
        result = msgspec.json.decode((self.run_dir / "result.json").read_bytes(), type=RunResult)
        assert code == (0 if result.ok else 1)
        return result

    def shutdown(self) -> RunResult:
        self.ask("shutdown")
        return self.ended()

    def close(self) -> None:
        """Ends the tree, whatever it is at."""
        if self.process.poll() is None:
            self.everything()
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        self._control.close()


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def steady(id: str, **fields: Any) -> ChildSpec:
    """A child that behaves until told otherwise."""
    return ChildSpec(id=id, start="supervised:Steady", **fields)


def child(id: str, name: str, **fields: Any) -> ChildSpec:
    """A child of another class of supervised.py."""
    return ChildSpec(id=id, start=f"supervised:{name}", **fields)


def nested(id: str, *children: ChildSpec, **fields: Any) -> ChildSpec:
    """A nested supervisor."""
    own = {name: fields.pop(name) for name in ("restart", "significant", "heartbeat_timeout_ms") if name in fields}
    return ChildSpec(id=id, type="supervisor", supervisor=SupervisorSpec(children=children, **fields), **own)
