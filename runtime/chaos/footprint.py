"""What the processes of a node hold of the machine: memory, descriptors, threads, socket files, arenas."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_runtime.runtime.chaos.inject import node_report


@dataclass(frozen=True)
class Footprint:
    """Of one process. `anonymous_bytes` leaves arenas and libraries out, and counts a page that is still shared after a
    fork in proportion (PSS)."""

    anonymous_bytes: int
    descriptors: int
    threads: int
    arenas: int


@dataclass(frozen=True)
class NodeFootprint:
    """Of all processes of a node, by name, the zygotes' added up under "zygotes"."""

    processes: dict[str, Footprint]
    socket_files: int
    run_dir_files: int

    @property
    def total(self) -> Footprint:
        return _sum(self.processes.values())


def node_footprint(run_dir: Path) -> NodeFootprint:
    """What the node of a run directory holds now. Raises UserError if it does not answer."""
    tree = node_report(run_dir).tree
    named = {each.name: each.pid for each in tree.walk() if each.pid is not None}
    processes = {name: _footprint(pid) for name, pid in named.items()}
    others = {child for pid in named.values() for child in _children(pid)} - set(named.values())
    processes["zygotes"] = _sum(_footprint(pid) for pid in others)
    files = [entry for entry in run_dir.rglob("*") if not entry.is_dir()]
    return NodeFootprint(processes, sum(entry.is_socket() for entry in files), len(files))


def _footprint(pid: int) -> Footprint:
    """Of one process; nothing if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return Footprint(0, 0, 0, 0)
    threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    anonymous = re.search(r"^Pss_Anon:\s+(\d+) kB", memory, re.MULTILINE)
    return Footprint(
        int(anonymous[1]) * 1024 if anonymous else 0,
        len(links),
        int(threads[1]) if threads else 0,
        sum("/memfd:" in link for link in links),
    )


def _children(pid: int) -> Iterator[int]:
    try:
        for task in os.scandir(f"/proc/{pid}/task"):
            yield from map(int, (Path(task.path) / "children").read_text().split())
    except OSError:
        return


def _sum(footprints: Iterable[Footprint]) -> Footprint:
    total = [0, 0, 0, 0]
    for each in footprints:
        for i, value in enumerate((each.anonymous_bytes, each.descriptors, each.threads, each.arenas)):
            total[i] += value
    return Footprint(*total)
