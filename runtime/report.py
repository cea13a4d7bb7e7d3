"""A node and its tree in the form that programs and the status page rely on."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_runtime.runtime.control import NodeReport
from llm_runtime.supervisors.status import NodeStatus


def as_json(report: NodeReport) -> dict[str, Any]:
    """What `runtime status --json` prints."""
    return {
        "node": report.node,
        "state": report.state,
        "url": report.url,
        "tree": _tree(report.tree),
        "events": msgspec.to_builtins(report.events),
    }


def _tree(status: NodeStatus) -> dict[str, Any]:
    """`last_exit` is a clause such as "killed by SIGKILL", or null; `doing` what its main loop last said, empty when
    idle; `cpu_percent` is 100 for one busy core; `pss_bytes` counts shared memory in shares that add up."""
    return {
        "name": status.name,
        "kind": status.kind,
        "role": status.role,
        "pid": status.pid,
        "state": status.state,
        "incarnation": status.incarnation,
        "restarts": status.restarts,
        "last_exit": status.last_exit.text if status.last_exit else None,
        "doing": status.doing,
        "doing_s": round(status.doing_s, 1),
        "uptime_s": round(status.uptime_s, 3),
        "cpu_percent": round(status.cpu_percent, 1),
        "rss_bytes": status.rss_bytes,
        "pss_bytes": status.pss_bytes,
        "children": [_tree(child) for child in status.children],
    }
