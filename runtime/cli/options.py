"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llm_runtime.runtime.shipped import find_topology
from llm_runtime.runtime.topology import LoadedTopology, load_topology


def add_topology(parser: argparse.ArgumentParser) -> None:
    """FILE, --port, --set and --log-level."""
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="topology file, or the name of one that comes with the runtime: smollm2"
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--port, --set and --log-level."""
    parser.add_argument("--port", type=int, metavar="N", help="port of the HTTP server, in place of ingress.port")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of the topology, such as engine.main.tp=2; may be given several times",
    )
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="in place of node.log_level")


def topology_of(options: argparse.Namespace, file: Path | None = None, settings: Sequence[str] = ()) -> LoadedTopology:
    """The topology that the options describe.

    Args:
        file: in place of the option FILE.
        settings: that --set may replace.

    Raises TopologyError.
    """
    settings = [*settings, *options.set]
    if options.log_level:
        settings.append(f"node.log_level={options.log_level}")
    return load_topology(find_topology(file or options.file), settings, options.port)


def add_node(parser: argparse.ArgumentParser) -> None:
    """--node."""
    parser.add_argument("--node", metavar="NAME", help="the node; may be left out when only one is running")
