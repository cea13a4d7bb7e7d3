"""Which actor lives on which node of a topology, and what that means for addresses.

The tree is built as if there were one machine (`runtime.tree`). `part_of` cuts out what one node runs, and gives the
actors that have peers elsewhere those peers' TCP addresses, the keys, and an address of their own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs, to_builtins

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.keys import Keys, read_keys
from llm_runtime.runtime.topology import LoadedTopology, Machine, Topology
from llm_runtime.supervisors.spec import ChildSpec, SupervisorSpec
from llm_runtime.transport import Network


@dataclass(frozen=True)
class Placement:
    """The nodes of a topology, as one of them sees it.

    Attributes:
        here: the node that is started; None for a topology of one machine, or one that is only looked at.
        machines: all nodes by name; empty for a topology of one machine.
        engines: node of each engine.
        ingress: node of the ingress and of everything else that is not an engine's.
        keys: None if there is but one node.
    """

    here: str | None = None
    machines: Mapping[str, Machine] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)
    ingress: str = ""
    keys: Keys | None = None

    def node_of(self, name: str) -> str:
        """The node of an actor, a supervisor or a memory file: an engine's begin with its name."""
        return self.engines.get(name.partition(".")[0], self.ingress)

    def is_here(self, name: str) -> bool:
        """Whether it lives on the node that is started."""
        return self.here is None or self.node_of(name) == self.here

    def ports(self, actors: Iterable[str]) -> dict[str, int]:
        """The TCP port of each actor, by its place among those of its node: the same after each restart.

        Args:
            actors: names of all actors of all nodes, in the same order everywhere.
        """
        free = {name: machine.port for name, machine in self.machines.items()}
        ports = {}
        for actor in actors:
            node = self.node_of(actor)
            ports[actor] = free[node]
            free[node] += 1
        return ports


def place(loaded: LoadedTopology, node: str | None) -> Placement:
    """Where everything lives. Raises UserError when the file has no such node, or its keys cannot be read.

    Args:
        node: the one that is started, if it is known.
    """
    topology = loaded.topology
    machines = topology.nodes
    if node is not None and node not in machines:
        remedy = f"choose one of {', '.join(machines)}" if machines else "leave --node out, or add a table [node.NAME]"
        raise UserError(f"there is no node {node} in {loaded.file}; {remedy}")
    if not machines:
        return Placement()
    first = next(iter(machines))
    return Placement(
        here=node,
        machines=machines,
        engines={name: engine.node or first for name, engine in topology.engine.items()},
        ingress=topology.ingress.node or first,
        keys=_keys(loaded) if len(machines) > 1 else None,
    )


def node_to_start(topology: Topology, wanted: str | None) -> str | None:
    """The node that `runtime up` starts. Raises UserError if that is not clear."""
    names = list(topology.nodes)
    if wanted is not None or not names:
        return wanted
    if len(names) > 1:
        raise UserError(f"the topology has several nodes: choose this machine's with --node {'|'.join(names)}")
    return names[0]


def listeners(root: SupervisorSpec, placement: Placement) -> dict[str, int]:
    """The TCP port of each actor, on whichever node, to which some actor of another node may send.

    Args:
        root: the whole tree.
    """
    workers = {child.id: child for child in root.descendants() if child.type == "worker"}
    called = {
        peer
        for child in workers.values()
        for peer in child.args["peers"]
        if placement.node_of(peer) != placement.node_of(child.id)
    }
    return {actor: port for actor, port in placement.ports(workers).items() if actor in called}


def part_of(root: SupervisorSpec, placement: Placement, epoch: int) -> SupervisorSpec:
    """What the node that is started runs of the whole tree.

    Args:
        epoch: when it is started, in milliseconds; see `transport.Network`.
    """
    if placement.here is None:
        return root
    ports = listeners(root, placement)

    def address(actor: str) -> str:
        return tcp_address(placement.machines[placement.node_of(actor)].address, ports[actor])

    def worker(child: ChildSpec) -> ChildSpec:
        far = {peer: address(peer) for peer in child.args["peers"] if not placement.is_here(peer)}
        if not far and child.id not in ports:
            return child
        assert placement.keys is not None  # there is another node
        host = placement.machines[placement.node_of(child.id)].address
        listen = tcp_address(ip_address(host), ports[child.id]) if child.id in ports else ""
        network = Network(placement.keys.public, placement.keys.secret, epoch, listen)
        args = {**child.args, "peers": {**child.args["peers"], **far}, "network": to_builtins(network)}
        return structs.replace(child, args=args)

    def part(spec: SupervisorSpec) -> SupervisorSpec:
        here = [child for child in spec.children if placement.is_here(child.id)]
        return structs.replace(
            spec,
            children=tuple(
                worker(child) if child.supervisor is None else structs.replace(child, supervisor=part(child.supervisor))
                for child in here
            ),
        )

    return part(root)


def tcp_address(host: str, port: int) -> str:
    """A mailbox address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def ip_address(host: str) -> str:
    """The IP address of a host. Raises UserError if there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise UserError(f'there is no host "{host}"') from None


def _keys(loaded: LoadedTopology) -> Keys:
    given = loaded.topology.transport.keys
    assert given is not None  # the topology was checked
    path = Path(os.path.abspath(loaded.base_of("transport.keys") / Path(given).expanduser()))
    try:
        return read_keys(path)
    except UserError as error:
        raise loaded.error("transport.keys", str(error)) from None
