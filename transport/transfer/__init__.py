"""Transfer engines: they read bytes out of regions of memory that another process has registered.

A receiver pulls. So only its own process ever writes into its memory, and when that process has ended, or its engine
has said that a read is over, nothing is written there any more.
"""

from llm_runtime.transport.transfer.create import TransferSettings, create_engine
from llm_runtime.transport.transfer.engine import Piece, Region, TransferEngine, TransferStuck, TransferUnavailable

__all__ = [
    "Piece",
    "Region",
    "TransferEngine",
    "TransferSettings",
    "TransferStuck",
    "TransferUnavailable",
    "create_engine",
]
