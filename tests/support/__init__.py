"""What the tests of several folders share: waiting with a deadline, and nodes of `runtime up`.

What one folder alone needs stays in that folder.
"""

from support.node import MODEL, ROOT, Node, free_port, node_environment, require_model
from support.waiting import DEADLINE_S, eventually

__all__ = ["DEADLINE_S", "MODEL", "ROOT", "Node", "eventually", "free_port", "node_environment", "require_model"]
