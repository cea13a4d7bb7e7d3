"""The bootstrap actor: a registry of engines that lives on their heartbeats."""

from __future__ import annotations

import logging
import time

import msgspec

from actors.actor import Actor, handles, role_of
from actors.messages import EngineInfo, Register, Registry

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_GRACE_S = 1.25
"""After a start nothing is told for a little longer than a heartbeat, so that ingresses do not take a registry that is
still filling up for one that has lost engines."""
_MAX_ENGINES = 4096


class BootstrapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the bootstrap server.

    Attributes:
        forget_s: seconds after its last heartbeat that an engine is forgotten.
    """

    forget_s: float = 5.0


class Bootstrap(Actor):
    """Takes `Register` from schedulers and tells every ingress the `Registry`."""

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
        """A new ingress knows no engine yet."""
        if role_of(peer) == "ingress":
            self._tell(peer)

    @handles(Register)
    def register(self, message: Register, sender: str) -> None:
        """Lists an engine, or keeps it listed."""
        info = message.engine
        before = self.engines.get(info.engine)
        rival = self._rival(info)
        if rival is not None or (before is None and len(self.engines) >= _MAX_ENGINES):
            if info.engine not in self.refused:
                self._log_refusal(info, rival)
                self.refused.add(info.engine)
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

    def _log_refusal(self, info: EngineInfo, rival: EngineInfo | None) -> None:
        if rival is None:
            logger.error("engine %s is not listed: %d engines are listed already", info.engine, len(self.engines))
        else:
            logger.error(
                "engine %s (%s, %s) is not listed: engine %s (%s, %s) serves the same model %s with other KV pages; "
                "give both the same checkpoint, dtype and page size",
                info.engine,
                info.role,
                info.fingerprint,
                rival.engine,
                rival.role,
                rival.fingerprint,
                info.model,
            )

    def _tell_all(self) -> None:
        for ingress in self.peers_of_role("ingress"):
            self._tell(ingress)

    def _tell(self, ingress: str) -> None:
        if time.monotonic() >= self.silent_until:
            self.send(ingress, Registry(list(self.engines.values())))


def _offer(info: EngineInfo) -> EngineInfo:
    """What an engine offers, whatever its load is."""
    return msgspec.structs.replace(info, waiting=0, running=0)
