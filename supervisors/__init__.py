"""Erlang/OTP supervision for operating system processes.

A `Supervisor` starts the children of a `SupervisorSpec`, restarts them by its strategy when they die, and stops
them in order. Children are processes forked from a zygote in milliseconds; a child's class gets a `ChildContext` with
its `Link` to the supervisor. Supervisors nest: a child of type "supervisor" is a process of its own too.
"""

from supervisors.exits import CrashReport, ExitReason, read_crashes
from supervisors.link import MAX_PARKED, ChildContext, Link
from supervisors.spec import Backoff, ChildInstance, ChildSpec, SpecError, SupervisorSpec, validate
from supervisors.status import ChildCounts, ChildInfo, Culprit, Event, NodeStatus, RunResult
from supervisors.supervisor import Supervisor

__all__ = [
    "MAX_PARKED",
    "Backoff",
    "ChildContext",
    "ChildCounts",
    "ChildInfo",
    "ChildInstance",
    "ChildSpec",
    "CrashReport",
    "Culprit",
    "Event",
    "ExitReason",
    "Link",
    "NodeStatus",
    "RunResult",
    "SpecError",
    "Supervisor",
    "SupervisorSpec",
    "read_crashes",
    "validate",
]
