"""Reads between machines with the Mooncake transfer engine, over TCP or RDMA.

Peers shake hands with each other (`P2PHANDSHAKE`), so there is no metadata server. Mooncake knows no authentication:
whoever reaches its ports can read what is registered, and write to it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llm_runtime.transport.transfer.chunks import ChunkedReading, cut
from llm_runtime.transport.transfer.engine import Piece, Region, TransferFailed, TransferUnavailable
from llm_runtime.transport.transfer.listeners import listening, restrict_new
from llm_runtime.transport.transfer.worker import Endpoint, Reading, WorkerEngine

if TYPE_CHECKING:
    from llm_runtime.transport.transfer.create import TransferSettings

_CHUNK_BYTES = 8 * 2**20
_WINDOW = 4
_LANES = 16
"""TCP connections to a peer: as many as chunks can be under way, so that none waits for another's time to run out."""


class _Detail(msgspec.Struct, array_like=True, frozen=True):
    """Where the peer's engine is reached, and the addresses of its regions there."""

    session: str
    addresses: list[int]


class MooncakeEngine(WorkerEngine):
    """Reads with a Mooncake engine of its own. Raises TransferUnavailable where it cannot be made."""

    kind = "mooncake"

    def __init__(self, settings: TransferSettings) -> None:
        super().__init__(settings.timeout_s)
        # Read by the library when it is loaded and when connections are made.
        patience = str(max(1, int(settings.timeout_s / 2)))
        for name, value in {
            "MC_LOG_LEVEL": "ERROR",
            "MC_TCP_BIND_ADDRESS": settings.host,
            "MC_TCP_LANES_PER_PEER": str(_LANES),
            "MC_TCP_PROGRESS_TIMEOUT_SEC": patience,
            "MC_TCP_STATUS_TIMEOUT_SEC": patience,
            "MC_HANDSHAKE_CONNECT_TIMEOUT": patience,
        }.items():
            os.environ.setdefault(name, value)
        try:
            from mooncake.engine import TransferEngine
        except ModuleNotFoundError as error:
            raise TransferUnavailable(
                "mooncake transfers need a package: pip install mooncake-transfer-engine-non-cuda==0.3.13.post1"
            ) from error
        except ImportError as error:
            raise TransferUnavailable(
                f"mooncake cannot be loaded ({error}): "
                "install the system libraries libibverbs1, librdmacm1, libnuma1 and libcurl4"
            ) from error
        before = listening()
        self._engine: Any = TransferEngine()
        if self._engine.initialize(settings.host, "P2PHANDSHAKE", settings.protocol, settings.device):
            raise TransferUnavailable(
                f"mooncake cannot use {settings.protocol} on {settings.host}: see its messages above"
            )
        restrict_new(before, settings.host)
        self._session = f"{_bracketed(settings.host)}:{self._engine.get_rpc_port()}"
        self._addresses: list[int] = []

    def _attach(self, regions: Sequence[Region]) -> None:
        for region in regions:
            address = address_of(region.buffer)
            if self._engine.register_memory(address, region.buffer.nbytes):
                raise TransferUnavailable(f"mooncake cannot register the {region.buffer.nbytes} bytes of {region.name}")
            self._addresses.append(address)

    def _detail(self) -> bytes:
        return msgspec.msgpack.encode(_Detail(self._session, self._addresses))

    def _begin(self, peer: Endpoint, pieces: Sequence[Piece]) -> Reading:
        try:
            detail = msgspec.msgpack.decode(peer.detail, type=_Detail)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise TransferFailed(f"the endpoint is not one of mooncake: {error}") from None
        if len(detail.addresses) != len(peer.sizes):
            raise TransferFailed("the endpoint is not one of mooncake: it has more regions than addresses")
        return _Batches(self._engine, detail, self._addresses, pieces)

    def _detach(self) -> None:
        for address in self._addresses:
            self._engine.unregister_memory(address)
        self._addresses = []
        self._engine = None


class _Batches(ChunkedReading[int]):
    """Every chunk is a batch of one piece: in a batch of several, a failed one hides what becomes of the others."""

    def __init__(self, engine: Any, peer: _Detail, own: list[int], pieces: Sequence[Piece]) -> None:
        super().__init__(([piece] for piece in cut(pieces, _CHUNK_BYTES)), _WINDOW)
        self._engine = engine
        self._peer = peer
        self._own = own

    def _submit(self, chunk: list[Piece]) -> int:
        (piece,) = chunk
        batch: int = self._engine.batch_transfer_async_read(
            self._peer.session,
            [self._own[piece.local_region] + piece.local_offset],
            [self._peer.addresses[piece.remote_region] + piece.remote_offset],
            [piece.length],
        )
        if batch == 0:
            raise TransferFailed(f"mooncake does not reach {self._peer.session}")
        return batch

    def _ended(self, token: int) -> bool:
        state: int = self._engine.transfer_check_status(token)
        if state == -1:
            raise TransferFailed(f"mooncake's connection to {self._peer.session} has failed")
        return state == 1


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer lies in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
