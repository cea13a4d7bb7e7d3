"""Counts of starts, kept in RUNDIR/incarnations so that they outlive supervisors."""

from __future__ import annotations

from pathlib import Path

from supervisors.exits import write_atomically


def read_incarnation(run_dir: Path, name: str) -> int:
    """Number of the latest start of `name`; 0 if there was none."""
    try:
        return int((run_dir / "incarnations" / name).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def write_incarnation(run_dir: Path, name: str, incarnation: int) -> None:
    """Records a start."""
    write_atomically(run_dir / "incarnations" / name, str(incarnation).encode())
