"""Topology files: what a node consists of, as a user writes it."""

from llm_runtime.runtime.topology.load import LoadedTopology, TopologyError, load_topology
from llm_runtime.runtime.topology.schema import (
    Engine,
    Faults,
    Ingress,
    Machine,
    Model,
    Node,
    Supervision,
    Topology,
    Transport,
)

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
