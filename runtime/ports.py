"""Whether the TCP ports of a topology's nodes fit: to each other, and to this machine."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import replace
from pathlib import Path

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.placement import ip_address, listeners
from llm_runtime.runtime.plan import NodePlan
from llm_runtime.runtime.topology import LoadedTopology, TopologyError
from llm_runtime.runtime.tree import actor_names, build_tree

_MAX_PORT = 65_535


def listening(plan: NodePlan) -> dict[str, int]:
    """The TCP port of each actor that hears from other nodes, on whichever node it lives."""
    looked_at = replace(plan, placement=replace(plan.placement, here=None))
    return listeners(build_tree(looked_at, Path()), looked_at.placement)


def check_ports(loaded: LoadedTopology, plan: NodePlan) -> None:
    """Raises TopologyError if two things that listen have the same port, or a port is too high."""
    placement = plan.placement
    nodes = [placement.node_of(actor) for actor in actor_names(plan)]
    taken: dict[str, list[tuple[range, str]]] = {}
    for node, machine in placement.machines.items():
        ports = range(machine.port, machine.port + nodes.count(node))
        others = taken.setdefault(machine.address, [])
        if node == placement.ingress:
            http = plan.topology.ingress.port
            others.append((range(http, http + 1), "HTTP"))
        for other, what in others:
            if ports.start < other.stop and other.start < ports.stop:
                raise _port_error(loaded, node, ports, f"{what} has {_words(other)} of the same machine")
        if ports.stop - 1 > _MAX_PORT:
            raise _port_error(loaded, node, ports, f"{_MAX_PORT} is the last one")
        others.append((ports, f"node {node}"))


def check_machine(loaded: LoadedTopology, plan: NodePlan) -> None:
    """Raises TopologyError if the node that is started cannot listen where the others expect it."""
    placement = plan.placement
    if placement.here is None:
        return
    key, host = f"node.{placement.here}.address", placement.machines[placement.here].address
    try:
        address = ip_address(host)
    except UserError as error:
        raise loaded.error(key, f"{error}; give an IP address, or a name that this machine can resolve") from None
    if host not in (address, "localhost") and ipaddress.ip_address(address).is_loopback:
        problem = f'is "{host}", which is {address} for this machine itself, where no other can reach it'
        raise loaded.error(key, f"{problem}; give its IP address")
    for actor, port in listening(plan).items():
        if not placement.is_here(actor):
            continue
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    problem = f"port {port}, which is for {actor}, is in use by another program"
                    raise loaded.error(f"node.{placement.here}.port", f"{problem}; give another first port") from None
                problem = f'is "{host}", on which this machine cannot listen ({error.strerror})'
                raise loaded.error(
                    key, f"{problem}; correct it, or start the node of this machine with --node"
                ) from None


def _port_error(loaded: LoadedTopology, node: str, ports: range, problem: str) -> TopologyError:
    needed = f"is {ports.start}, so the node's actors take {_words(ports)}, and {problem}"
    return loaded.error(f"node.{node}.port", f"{needed}; give another first port")


def _words(ports: range) -> str:
    return f"port {ports.start}" if len(ports) == 1 else f"ports {ports.start} to {ports.stop - 1}"
