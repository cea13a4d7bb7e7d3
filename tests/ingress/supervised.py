"""Runs ingress workers below a real supervisor, in a process of its own.

Started as `python supervised.py ARGUMENTS` where ARGUMENTS is a JSON object: run_dir; workers, a list of [name, args];
descriptors, by name; journal_bytes of each worker. Prints a line "ready NAME PID INCARNATION" whenever a worker is
ready, and ends when standard input does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from llm_runtime.supervisors import Backoff, ChildSpec, Event, Supervisor, SupervisorSpec
from llm_runtime.transport import Arena


def heard(event: Event) -> None:
    """Tells the test which workers there are."""
    if event.kind in ("starting", "ready", "gave_up") and event.id.startswith("ingress"):
        print(event.kind, event.id, event.pid or 0, event.incarnation, flush=True)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run below nohup, which leaves it ignored
    gc.disable()
    importlib.import_module("llm_runtime.actors.ingress")
    descriptors = dict(arguments["descriptors"])
    children = []
    for name, args in arguments["workers"]:
        journal = f"{name}.journal"
        descriptors[journal] = Arena.create(journal, arguments["journal_bytes"])
        children.append(
            ChildSpec(id=name, start="llm_runtime.actors.ingress:Ingress", args=args, descriptors=("listener", journal))
        )
    backoff = Backoff(cap_ms=0, give_up_after=1000)
    spec = SupervisorSpec(children=tuple(children), intensity=1000, period_s=1, backoff=backoff)
    supervisor = Supervisor(spec, Path(arguments["run_dir"]), descriptors=descriptors)
    supervisor.start_zygote()
    gc.enable()
    stop, theirs = os.pipe()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        os.write(theirs, b"x")

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    supervisor.run(on_event=heard, extra={stop: supervisor.shutdown})


if __name__ == "__main__":
    main()
