"""How much of the machine this process may use: its processors and memory as its control groups limit them.

Groups are nested, and the narrowest limit holds. Version 2 has one hierarchy; of version 1 the controllers `cpu` and
`memory` may have one each. See cgroups(7) and the kernel's documentation of cpu.max, cpu.cfs_quota_us, memory.max and
memory.limit_in_bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC = Path("/proc/self")


def cpu_count() -> int:
    """Processors that this process may keep busy, at least 1: those it may run on, or its quota if that is less.

    A fraction is rounded down: of threads that work together, all wait for the one that is out of time.
    """
    quota = min(map(_quota, _groups("cpu")), default=float("inf"))
    return max(1, int(min(len(os.sched_getaffinity(0)), quota)))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's if that is less."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [_number(group / name) for group in _groups("memory") for name in names]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def _quota(group: Path) -> float:
    """Processors that a group has by its quota; infinity if it has none."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return float("inf") if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    limit_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return limit_us / period_us if limit_us and limit_us > 0 and period_us else float("inf")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None


def _groups(controller: str) -> Iterator[Path]:
    """Directories of the groups of this process that may limit `controller`, from the innermost to the outermost one
    that can be seen."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
        mounts = list(_mounts())
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root, place, mounted in mounts:
            if controller not in mounted.split(",") if controllers else mounted:
                continue
            # In a container the mount may begin at the group itself, or the group be known by a path outside.
            inside = os.path.relpath(group, root) if group.startswith(root) else "."
            directory = place / inside
            while True:
                if directory.is_dir():
                    yield directory
                if directory in (place, directory.parent):
                    break
                directory = directory.parent


def _mounts() -> Iterator[tuple[str, Path, str]]:
    """Mounted hierarchies: which group is at the top, where, and which controllers; none for version 2."""
    for line in (_PROC / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, place = (each.encode().decode("unicode_escape") for each in before.split()[3:5])
            yield root, Path(place), options if kind == "cgroup" else ""
