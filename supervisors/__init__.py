"""Erlang/OTP supervision for operating system processes.

A `Supervisor` starts the children of a `SupervisorSpec`, restarts them by its strategy when they die, and stops
them in order. Children are processes forked from a zygote in milliseconds; a child's class gets a `ChildContext` with
its `Link` to the supervisor. Supervisors nest: a child of type "supervisor" is a process of its own too.
"""

from llm_runtime.supervisors.exits import CrashReport, ExitReason, read_crashes
from llm_runtime.supervisors.link import MAX_STORED_FDS, ChildContext, Link
from llm_runtime.supervisors.spec import Backoff, ChildInstance, ChildSpec, SpecError, SupervisorSpec, validate
from llm_runtime.supervisors.status import ChildCounts, ChildInfo, Culprit, Event, NodeStatus, RunResult
from llm_runtime.supervisors.supervisor import Supervisor

__all__ = [
    "MAX_STORED_FDS",
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
