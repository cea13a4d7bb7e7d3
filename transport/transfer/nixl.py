"""Reads between machines with NIXL and its UCX backend: TCP, shared memory, or RDMA where there is a device for it."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llm_runtime.transport.transfer.chunks import ChunkedReading, cut, grouped
from llm_runtime.transport.transfer.engine import Piece, Region, TransferFailed, TransferUnavailable
from llm_runtime.transport.transfer.listeners import listening, restrict_new
from llm_runtime.transport.transfer.mooncake import address_of
from llm_runtime.transport.transfer.worker import Endpoint, Reading, WorkerEngine

if TYPE_CHECKING:
    from llm_runtime.transport.transfer.create import TransferSettings

_CHUNK_BYTES = 2 * 2**20
_WINDOW = 2
_MAX_AGENTS = 64
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>


class _Detail(msgspec.Struct, array_like=True, frozen=True):
    """The metadata of the peer's agent, and the addresses of its regions."""

    metadata: bytes
    addresses: list[int]


class NixlEngine(WorkerEngine):
    """Reads with a NIXL agent of its own. Raises TransferUnavailable where it cannot be made."""

    kind = "nixl"

    def __init__(self, settings: TransferSettings) -> None:
        super().__init__(settings.timeout_s)
        # Read when UCX is loaded. With a device of RDMA it chooses its ways itself.
        os.environ.setdefault("UCX_NET_DEVICES", settings.device or interface_of(settings.host))
        if not settings.device:
            os.environ.setdefault("UCX_TLS", "tcp,sm")
        os.environ.setdefault("UCX_LOG_LEVEL", "error")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl_cu12._api import nixl_agent, nixl_agent_config
        except ModuleNotFoundError as error:
            raise TransferUnavailable("nixl transfers need a package: pip install nixl-cu12==1.5.1") from error
        except ImportError as error:
            raise TransferUnavailable(f"nixl cannot be loaded: {error}") from error
        before = listening()
        try:
            # Its name tells peers one incarnation from another.
            self._agent: Any = nixl_agent(secrets.token_hex(8), nixl_agent_config(backends=["UCX"]))
        except Exception as error:
            raise TransferUnavailable(f"nixl cannot be used: {error}") from error
        restrict_new(before, settings.host)
        self._addresses: list[int] = []
        self._registered: Any = None
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()

    def _attach(self, regions: Sequence[Region]) -> None:
        self._addresses = [address_of(region.buffer) for region in regions]
        blocks = [
            (address, region.buffer.nbytes, 0, region.name)
            for address, region in zip(self._addresses, regions, strict=True)
            if region.buffer.nbytes
        ]
        if blocks:
            try:
                self._registered = self._agent.register_memory(blocks, "DRAM")
            except Exception as error:
                raise TransferUnavailable(f"nixl cannot register the memory: {error}") from error

    def _detail(self) -> bytes:
        return msgspec.msgpack.encode(_Detail(self._agent.get_agent_metadata(), self._addresses))

    def _begin(self, peer: Endpoint, pieces: Sequence[Piece]) -> Reading:
        return _Requests(self._peer(peer), self._addresses, pieces)

    def _peer(self, endpoint: Endpoint) -> _Peer:
        """The peer's agent. Raises TransferFailed."""
        known = self._peers.get(endpoint.detail)
        if known is not None and not known.lost:
            self._peers.move_to_end(endpoint.detail)
            return known
        try:
            detail = msgspec.msgpack.decode(endpoint.detail, type=_Detail)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise TransferFailed(f"the endpoint is not one of nixl: {error}") from None
        if len(detail.addresses) != len(endpoint.sizes):
            raise TransferFailed("the endpoint is not one of nixl: it has more regions than addresses")
        for old in [key for key, peer in self._peers.items() if peer.lost]:
            self._forget(old)
        if len(self._peers) >= _MAX_AGENTS:
            self._forget(next(iter(self._peers)))
        try:
            name = self._agent.add_remote_agent(detail.metadata)
        except Exception as error:
            raise TransferFailed(f"nixl does not take the peer's endpoint: {error}") from None
        peer = self._peers[endpoint.detail] = _Peer(self._agent, name, detail.addresses)
        return peer

    def _forget(self, detail: bytes) -> None:
        peer = self._peers.pop(detail)
        try:
            self._agent.remove_remote_agent(peer.name)
        except Exception:  # it is gone already
            pass

    def _detach(self) -> None:
        for detail in list(self._peers):
            self._forget(detail)
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        self._agent = self._registered = None


class _Peer:
    """A remote agent that the own one knows. A lost one has to be introduced again."""

    def __init__(self, agent: Any, name: str, addresses: list[int]) -> None:
        self.agent = agent
        self.name = name
        self.addresses = addresses
        self.lost = False


class _Requests(ChunkedReading[Any]):
    """Every chunk is a request of some pieces.

    A request under way is never released: UCX goes on writing what still arrives for it over TCP.
    """

    def __init__(self, peer: _Peer, own: list[int], pieces: Sequence[Piece]) -> None:
        chunks: Iterator[list[Piece]] = grouped(cut(pieces, _CHUNK_BYTES), _CHUNK_BYTES)
        super().__init__(chunks, _WINDOW)
        self._peer = peer
        self._own = own

    def _submit(self, chunk: list[Piece]) -> Any:
        agent, theirs = self._peer.agent, self._peer.addresses
        own = [(self._own[piece.local_region] + piece.local_offset, piece.length, 0) for piece in chunk]
        remote = [(theirs[piece.remote_region] + piece.remote_offset, piece.length, 0) for piece in chunk]
        try:
            request = agent.initialize_xfer(
                "READ", agent.get_xfer_descs(own, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), self._peer.name
            )
            state = agent.transfer(request)
        except Exception as error:
            raise self._failed(str(error)) from None
        if state == "ERR":
            raise self._failed("the request was refused")
        return request

    def _ended(self, token: Any) -> bool:
        agent = self._peer.agent
        try:
            state = agent.check_xfer_state(token)
        except Exception as error:
            state, reason = "ERR", str(error)
        else:
            reason = "the request has failed"
        if state == "PROC":
            return False
        agent.release_xfer_handle(token)
        if state != "DONE":
            raise self._failed(reason)
        return True

    def _failed(self, reason: str) -> TransferFailed:
        self._peer.lost = True
        return TransferFailed(f"nixl does not reach the peer: {reason}")


def interface_of(host: str) -> str:
    """The network interface that has an IPv4 address. Raises TransferUnavailable if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    raise TransferUnavailable(f"no network interface has the address {host}: nixl listens on that of an interface")
