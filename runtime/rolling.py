"""A rolling restart: every process of a node below its root is replaced, one subtree after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from llm_runtime.runtime.control import NodeReport, Renew, Restart, Status, ask, command
from llm_runtime.runtime.errors import UserError
from llm_runtime.supervisors.status import NodeStatus

PATIENCE_S = 600.0
_LOOK_S = 0.02


def restart_all(run_dir: Path, note: Callable[[str], None] = lambda _: None) -> int:
    """Restarts each child of the root in starting order and waits until the whole node runs before the next; how many
    processes were replaced. They run the program as it is on the disk when this begins: an upgrade, but for the root.

    A supervisor is replaced with all below it, right to left and then left to right again: an engine's scheduler and
    ranks stop and start together, since ranks share collectives and the new supervisor must be the parent of both.

    Args:
        note: told what has been replaced.

    Raises UserError when a process does not come back.
    """
    replaced = 0
    command(run_dir, Renew(), timeout_s=PATIENCE_S)
    for child in _running(run_dir).children:
        began = time.monotonic()
        command(run_dir, Restart(child.name), timeout_s=PATIENCE_S)
        after = {each.name: each.pid for each in _running(run_dir).walk()}
        before = {each.name: each.pid for each in child.walk()}
        if left := [name for name, pid in before.items() if after.get(name) == pid]:
            raise UserError(f"{left[0]} was not replaced; see `runtime status`")
        replaced += len(before)
        note(f"{', '.join(before)}: replaced in {time.monotonic() - began:.2f} s")
    return replaced


def _running(run_dir: Path) -> NodeStatus:
    """The tree, once all of it runs."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        report = ask(run_dir, Status())
        if not isinstance(report, NodeReport):
            raise UserError(report.error)
        if report.state == "running":
            return report.tree
        if report.state == "stopping" or time.monotonic() > deadline:
            raise UserError(f"the node {report.node} is {report.state}; see `runtime status`")
        time.sleep(_LOOK_S)
