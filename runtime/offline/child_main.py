"""The process of a node that a program has started for itself, for `PrivateNode`:
`python -m llm_runtime.runtime.offline.child_main`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import Struct

from llm_runtime.runtime.environment import prepare
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.placement import node_to_start
from llm_runtime.runtime.progress import Note, Progress, Ready, Stopped, notes_to, pipe_writer
from llm_runtime.runtime.topology import load_topology


class Order(Struct, frozen=True):
    """What the process reads on its standard input, as JSON.

    Attributes:
        file: topology file.
        settings: `--set` arguments.
        owner: the program's process id. It is the parent of this process.
        directory: run directories of this node alone; removed if the program has not lived to do it.
        listener: descriptor of the listening HTTP socket.
        progress: descriptor of a pipe for `Note`, `Ready` and `Stopped`.
        api_key: what HTTP clients must send.
    """

    file: str
    settings: list[str]
    owner: int
    directory: str
    listener: int
    progress: int
    api_key: str


def main() -> int:
    """Runs the node that is ordered until its owner stops it or ends; the exit status."""
    prepare()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    for descriptor in (order.listener, order.progress):
        os.set_inheritable(descriptor, False)
    try:
        return _run(order)
    finally:
        if os.getppid() != order.owner:
            shutil.rmtree(order.directory, ignore_errors=True)


def _run(order: Order) -> int:
    tell = pipe_writer(order.progress)
    try:
        pidfd = os.pidfd_open(order.owner)
    except ProcessLookupError:
        return 1
    if os.getppid() != order.owner:  # it had ended before, and another process has its number now
        return 1

    def tell_owner(progress: Progress) -> None:
        if isinstance(progress, Note | Ready | Stopped):  # few: nobody may be reading
            tell(progress)

    listener = socket.socket(fileno=order.listener)
    try:
        loaded = load_topology(Path(order.file), order.settings, listener.getsockname()[1])
        if len(loaded.topology.models) > 1:
            raise UserError(f"{loaded.file} serves several models, and LLM is for one: serve them with `runtime up`")
        node = node_to_start(loaded.topology, None)
        from llm_runtime.runtime.native import build_kernels
        from llm_runtime.runtime.node import Owner, run_node  # torch and all: only when the topology is right
        from llm_runtime.runtime.plan import plan_node

        plan = replace(
            plan_node(loaded, note=notes_to(tell), node=node),
            api_key=order.api_key,
        )
        build_kernels(plan, notes_to(tell))
        return run_node(plan, tell_owner, detached=True, owner=Owner(pidfd, listener))
    except UserError as error:
        tell(Stopped(str(error)))
        return 1


if __name__ == "__main__":
    sys.exit(main())
