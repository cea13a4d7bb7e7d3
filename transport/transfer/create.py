"""Which transfer engine is used, and with which settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llm_runtime.transport.transfer.engine import TransferEngine
from llm_runtime.transport.transfer.null import NoTransfer
from llm_runtime.transport.transfer.shm import ShmEngine

TransferKind = Literal["shared", "shm", "tcp", "mooncake", "nixl", "fake"]
LOOPBACK = "127.0.0.1"


class TransferSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a transfer engine; both sides of a transfer have the same.

    Attributes:
        kind: `shared` where both sides use the same memory, `shm` between processes of one machine, `tcp`,
            `mooncake` and `nixl` between machines, `fake` moves nothing.
        host: the address that tcp, mooncake and nixl listen on, and under which peers reach it.
        protocol: of mooncake.
        device: of RDMA: for mooncake with protocol rdma a name such as mlx5_0, the fitting ones if empty; for nixl a
            name as UCX has it, such as mlx5_0:1, and if empty TCP is used.
        public, secret: of tcp, the key pair of all who may read from each other, in Z85.
        timeout_s: a read to which nothing comes for so long has failed.
    """

    kind: TransferKind = "shm"
    host: str = LOOPBACK
    protocol: Literal["tcp", "rdma"] = "tcp"
    device: str = ""
    public: str = ""
    secret: str = ""
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 4.0

    def __repr__(self) -> str:
        return f"TransferSettings(kind={self.kind!r}, host={self.host!r})"  # keys do not belong into logs

    def check(self) -> None:
        """Raises ValueError for settings that do not fit together."""
        if self.kind not in ("tcp", "mooncake", "nixl") and self.host != LOOPBACK:
            raise ValueError(f"{self.kind} transfers use no network: leave out host")
        if self.kind != "mooncake" and self.protocol != "tcp":
            raise ValueError(f"protocol = {self.protocol} is for mooncake: set kind to mooncake or leave out protocol")
        if self.device and self.protocol != "rdma" and self.kind != "nixl":
            raise ValueError(f"device = {self.device} is for rdma: set protocol to rdma or leave out device")
        if (self.kind == "tcp") != bool(self.public and self.secret):
            raise ValueError("tcp transfers, and no others, need a pair of keys: public and secret")
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(f"host = {self.host} is not an IP address") from None


def create_engine(settings: TransferSettings, sources: Mapping[str, memoryview] | None = None) -> TransferEngine:
    """An engine, to be made in the process that uses it: some start threads.

    `sources` is the memory of peers that is mapped here, by name; for `shm` alone.

    Raises:
        ValueError: the settings do not fit together.
        TransferUnavailable: something that the engine needs is not installed.
    """
    settings.check()
    if settings.kind in ("shared", "fake"):
        return NoTransfer()
    if settings.kind == "shm":
        return ShmEngine(sources or {}, settings.timeout_s)
    if settings.kind == "tcp":
        from llm_runtime.transport.transfer.tcp import TcpEngine

        return TcpEngine(settings)
    if settings.kind == "mooncake":
        from llm_runtime.transport.transfer.mooncake import MooncakeEngine

        return MooncakeEngine(settings)
    from llm_runtime.transport.transfer.nixl import NixlEngine

    return NixlEngine(settings)
