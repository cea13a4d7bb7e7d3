"""Topology files: what a node consists of, as a user writes it."""

from runtime.topology.load import LoadedTopology, TopologyError, load_topology
from runtime.topology.schema import Engine, Faults, Ingress, Machine, Model, Node, Supervision, Topology, Transport

__all__ = [
    "Engine",
    "Faults",
    "Ingress",
    "LoadedTopology",
    "Machine",
    "Model",
    "Node",
    "Supervision",
    "Topology",
    "TopologyError",
    "Transport",
    "load_topology",
]
