"""A node that has restarted its processes many times holds no more of the machine than before."""

from __future__ import annotations

import os
import signal

from support import Node, eventually

from llm_runtime.runtime.chaos.footprint import NodeFootprint, node_footprint

ACTORS = ("bootstrap", "main.rank0", "main.scheduler", "detokenizer", "tokenizer", "main.ranks")
ROUNDS = 5
LEAST_LEAK_BYTES = 8 * 2**20


def restart_all(node: Node) -> None:
    for name in ACTORS:
        pid = node.pid(name)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda name=name, pid=pid: node.actor(name).pid != pid and node.state() == "running", name)


def settled(node: Node, wanted: NodeFootprint | None) -> NodeFootprint:
    """The footprint once the node is at rest: connections to peers are made one after the other."""
    question = {"prompt": "The sea", "max_tokens": 4, "temperature": 0}
    node.post("/v1/completions", question)

    def look() -> NodeFootprint | None:
        found = node_footprint(node.run_dir)
        return found if wanted is None or held(found) == held(wanted) else None

    return eventually(look, "as many descriptors, threads and files as before")


def held(footprint: NodeFootprint) -> object:
    processes = {name: (each.descriptors, each.threads, each.arenas) for name, each in footprint.processes.items()}
    return processes, footprint.socket_files, footprint.run_dir_files


def test_thirty_restarts_leave_nothing_behind(node: Node) -> None:
    for _ in range(2):
        restart_all(node)
    before = settled(node, None)
    for _ in range(ROUNDS):
        restart_all(node)
    after = settled(node, before)
    for name in ("root", "main", "ingress0"):  # the ones that have lived all the time, and their zygotes
        grown = after.processes[name].anonymous_bytes - before.processes[name].anonymous_bytes
        assert grown < LEAST_LEAK_BYTES, f"{name} holds {grown} bytes more"
