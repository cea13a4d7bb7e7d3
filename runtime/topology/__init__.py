"""Topology files: what a node consists of, as a user writes it."""

from runtime.topology.load import LoadedTopology, TopologyError, load_topology
from runtime.topology.schema import Engine, Faults, Ingress, Model, Node, Supervision, Topology

__all__ = [
    "Engine",
    "Faults",
    "Ingress",
    "LoadedTopology",
    "Model",
    "Node",
    "Supervision",
    "Topology",
    "TopologyError",
    "load_topology",
]
