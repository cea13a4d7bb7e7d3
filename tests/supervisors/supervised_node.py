"""A supervision tree in a process of its own, steered by the tests over a socket (descriptor in argv[2])."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import supervised  # noqa: F401  what is imported here need not be imported by each child

from llm_runtime.supervisors import ChildInstance, ChildSpec, Event, Supervisor, SupervisorSpec


class Request(msgspec.Struct):
    """What a test asks; `new` is a ChildSpec, `instance` a ChildInstance, for op "start"."""

    op: str
    id: str = ""
    under: str = ""
    graceful: bool = True
    signum: int = 0
    new: ChildSpec | None = None
    instance: ChildInstance | None = None


class Answer(msgspec.Struct):
    error: str = ""
    value: Any = None


def main() -> None:
    run_dir, fd = Path(sys.argv[1]), int(sys.argv[2])
    descriptors = {name: int(number) for name, number in (text.split("=") for text in sys.argv[3:])}
    spec = msgspec.json.decode((run_dir / "spec.json").read_bytes(), type=SupervisorSpec)
    if (run_dir / "upgraded.py").exists():
        sys.path.append(str(run_dir))
        importlib.import_module("upgraded")
    control = socket.socket(fileno=fd)
    supervisor = Supervisor(spec, run_dir, descriptors=descriptors)
    supervisor.start_zygote()
    if (run_dir / "threads").exists():  # a root that could not fork a second zygote
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    def answer(error: str = "", value: Any = None) -> None:
        control.send(msgspec.json.encode(Answer(error=error, value=value)))

    def asked() -> None:
        data = control.recv(1 << 20)
        if not data:
            os._exit(1)  # the test is gone
        request = msgspec.json.decode(data, type=Request)
        match request.op:
            case "tree":
                answer(value=supervisor.tree())
            case "which":
                answer(value=supervisor.which_children(request.under))
            case "count":
                answer(value=supervisor.count_children(request.under))
            case "fds":
                answer(value=len(os.listdir("/proc/self/fd")))
            case "start":
                new = request.new or request.instance
                assert new is not None
                supervisor.start_child(new, under=request.under, done=answer)
            case "terminate":
                supervisor.terminate_child(request.id, done=answer)
            case "restart":
                supervisor.restart_child(request.id, request.graceful, done=answer)
            case "delete":
                supervisor.delete_child(request.id, done=answer)
            case "signal":
                supervisor.signal_child(request.id, request.signum, done=answer)
            case "renew":
                supervisor.renew_zygote(done=answer)
            case "shutdown":
                supervisor.shutdown()
                answer()

    def heard(event: Event) -> None:
        with (run_dir / "events").open("ab") as file:
            file.write(msgspec.json.encode(event) + b"\n")

    result = supervisor.run(on_event=heard, extra={fd: asked})
    (run_dir / "result.json").write_bytes(msgspec.json.encode(result))
    sys.exit(0 if result.ok else 1)


if __name__ == "__main__":
    main()
