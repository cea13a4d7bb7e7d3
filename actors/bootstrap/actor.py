"""The bootstrap actor: a registry of engines that lives on their heartbeats."""

from __future__ import annotations

import logging
import time

import msgspec

from llm_runtime.actors.actor import Actor, handles, role_of
from llm_runtime.actors.messages import EngineInfo, Register, RegisterRefused, Registry

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_GRACE_S = 1.25
"""After a start nothing is told for a little longer than a heartbeat, so that nobody takes a registry that is still
filling up for one that has lost engines."""
_MAX_ENGINES = 4096


class BootstrapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the bootstrap server.

    Attributes:
        forget_s: seconds after its last heartbeat that an engine is forgotten.
    """

    forget_s: float = 5.0


class Bootstrap(Actor):
    """Takes `Register` from schedulers and tells every ingress and every decode scheduler the `Registry`."""

    def setup(self) -> None:
        """Starts with an empty registry; the schedulers fill it within a second."""
        self.config = msgspec.convert(self.args.config, BootstrapConfig)
        self.engines: dict[str, EngineInfo] = {}
        self.seen: dict[str, float] = {}
        self.refused: set[str] = set()
        self.silent_until = time.monotonic() + _GRACE_S
        self.after(_GRACE_S, self._tell_all)
        self.every(_INTERVAL_S, self._tick)

    def peer_started(self, peer: str, incarnation: int) -> None:
        """A new ingress or decode scheduler knows no engine yet."""
        if role_of(peer) == "ingress" or peer in self._decode_schedulers():
            self._tell(peer)

    @handles(Register)
    def register(self, message: Register, sender: str) -> None:
        """Lists an engine, or keeps it listed."""
        info = message.engine
        before = self.engines.get(info.engine)
        rival = self._rival(info)
        if rival is not None or (before is None and len(self.engines) >= _MAX_ENGINES):
            reason = _refusal(info, rival)
            if info.engine not in self.refused:
                logger.error("%s", reason)
                self.refused.add(info.engine)
            self.send(sender, RegisterRefused(reason))
            if before is not None:
                self._forget(info.engine)
                self._tell_all()
            return
        self.refused.discard(info.engine)
        self.engines[info.engine] = info
        self.seen[info.engine] = time.monotonic()
        if before is None or _offer(before) != _offer(info):
            logger.info("engine %s (%s) serves %s on %s", info.engine, info.role, info.model, info.scheduler)
            self._tell_all()

    def stats(self) -> dict[str, float]:
        """Engines listed and refused."""
        return {"bootstrap_engines": float(len(self.engines)), "bootstrap_refused": float(len(self.refused))}

    def _tick(self) -> None:
        oldest = time.monotonic() - self.config.forget_s
        for engine in [engine for engine, seen in self.seen.items() if seen < oldest]:
            logger.warning("engine %s has not been heard of for %g s and is forgotten", engine, self.config.forget_s)
            self._forget(engine)
        self._tell_all()

    def _forget(self, engine: str) -> None:
        del self.engines[engine], self.seen[engine]
        self.refused.clear()  # who was refused for its sake may be listed now, or is refused, and logged, again

    def _rival(self, info: EngineInfo) -> EngineInfo | None:
        """A listed engine that would exchange KV pages with this one and has other pages."""
        for other in self.engines.values():
            if (
                other.engine != info.engine
                and other.model == info.model
                and {other.role, info.role} == {"prefill", "decode"}
                and other.fingerprint != info.fingerprint
            ):
                return other
        return None

    def _decode_schedulers(self) -> list[str]:
        return [info.scheduler for info in self.engines.values() if info.role == "decode"]

    def _tell_all(self) -> None:
        for peer in [*self.peers_of_role("ingress"), *self._decode_schedulers()]:
            self._tell(peer)

    def _tell(self, peer: str) -> None:
        if time.monotonic() >= self.silent_until:
            self.send(peer, Registry(list(self.engines.values())))


def _refusal(info: EngineInfo, rival: EngineInfo | None) -> str:
    """Why an engine is not listed, and what to do."""
    if rival is None:
        return f"engine {info.engine} is not listed: {_MAX_ENGINES} engines are listed already"
    return (
        f"engine {info.engine} ({info.role}, {info.fingerprint}) is not listed: engine {rival.engine} ({rival.role}, "
        f"{rival.fingerprint}) serves the same model {info.model} with other KV pages; give both the same checkpoint, "
        "dtype, kv_dtype and page size"
    )


def _offer(info: EngineInfo) -> EngineInfo:
    """What an engine offers, whatever its load is."""
    return msgspec.structs.replace(info, waiting=0, running=0)
