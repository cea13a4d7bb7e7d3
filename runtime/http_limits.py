"""What a node's HTTP servers allow on this machine, and what about them is dangerous."""

from __future__ import annotations

import resource

from llm_runtime.runtime.plan import NodePlan
from llm_runtime.supervisors.linux import descriptors_for_connections


def describe_http(plan: NodePlan) -> str:
    """A line for `runtime check`: how many clients may be connected."""
    limit = _descriptors()
    connections = descriptors_for_connections(limit)
    requests = plan.topology.ingress.max_concurrent * plan.topology.ingress.workers
    return f"http    {connections:,} connections (ulimit -n {limit:,}), {requests:,} requests at once"


def http_warnings(plan: NodePlan) -> list[str]:
    """Sentences for those who start the node."""
    ingress, limit = plan.topology.ingress, _descriptors()
    warnings = []
    if plan.is_open:
        warnings.append(
            f"everybody who reaches {ingress.host} port {ingress.port} may use the server: set RUNTIME_API_KEY, or "
            "ingress.host to 127.0.0.1"
        )
    requests, allowed = ingress.max_concurrent * ingress.workers, descriptors_for_connections(limit)
    if requests > allowed:
        warnings.append(
            f"{requests:,} requests at once need as many connections, and `ulimit -n` ({limit:,}) allows {allowed:,}: "
            "raise it (ulimit -Hn), or lower ingress.max_concurrent"
        )
    return warnings


def _descriptors() -> int:
    """Open files that a process may have: the node raises the soft limit to the hard one."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
