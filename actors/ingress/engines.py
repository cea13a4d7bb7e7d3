"""The engines that the bootstrap server knows, and which of them takes the next request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from llm_runtime.actors.messages import EngineInfo

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long an engine is kept that the registry no longer lists: a restarted bootstrap server hears of the engines one
by one."""


class _Engine:
    """An engine, when it was last listed, and what this ingress has sent since its load was last reported."""

    __slots__ = ("info", "listed_at", "sent")

    def __init__(self, info: EngineInfo, listed_at: float) -> None:
        self.info = info
        self.listed_at = listed_at
        self.sent = 0

    @property
    def load(self) -> int:
        return self.info.waiting + self.info.running + self.sent


class Engines:
    """Engines that serve this ingress's models, by the name of their scheduler. The last registry is kept while the
    bootstrap server is away.

    Args:
        models: those of which an engine must serve one; an empty name stands for any.
        add_peer: called with (scheduler's name, address) of each engine. Raises ValueError for a bad address.
    """

    def __init__(self, models: Iterable[str], add_peer: Callable[[str, str], None]) -> None:
        self._models = frozenset(models)
        self._add_peer = add_peer
        self._engines: dict[str, _Engine] = {}
        self._prefills: dict[str, _Engine] = {}
        self._foreign: set[str] = set()

    def __len__(self) -> int:
        return len(self._engines)

    def serve(self, model: str) -> bool:
        """Whether some engine that takes requests serves a model; any, if its name is empty."""
        return any(not model or engine.info.model == model for engine in self._engines.values())

    def complete(self, model: str) -> bool:
        """Whether a model is served, and if only by engines that need others to fill KV pages, those are there too."""
        roles = {info.role for info in self.infos if not model or info.model == model}
        return "unified" in roles or {"prefill", "decode"} <= roles

    def __contains__(self, scheduler: str) -> bool:
        return scheduler in self._engines

    def update(self, infos: list[EngineInfo], now: float) -> None:
        """Takes in a registry. An engine is gone when registries have not listed it for a while."""
        for info in infos:
            if not self._serves_model(info):
                continue
            engines = self._prefills if info.role == "prefill" else self._engines
            known = engines.get(info.scheduler)
            if known is None or known.info.address != info.address:
                try:
                    self._add_peer(info.scheduler, info.address)
                except ValueError as error:
                    logger.warning("engine %s is not usable: %s", info.engine, error)
                    continue
            engines[info.scheduler] = _Engine(info, now)
        for engines in (self._engines, self._prefills):
            gone = [name for name, engine in engines.items() if now - engine.listed_at > GRACE_S]
            for name in gone:
                logger.warning("engine %s is no longer registered", engines.pop(name).info.engine)

    @property
    def infos(self) -> list[EngineInfo]:
        """All engines, by name, those that only fill KV pages for others among them."""
        engines = [engine.info for engine in (*self._engines.values(), *self._prefills.values())]
        return sorted(engines, key=lambda info: info.engine)

    def choose(self, model: str = "") -> str | None:
        """The scheduler of the engine with the least waiting and running requests, None while no engine is known.

        Args:
            model: what it must serve; empty for any.
        """
        able = [name for name, engine in self._engines.items() if not model or engine.info.model == model]
        if not able:
            return None
        name = min(able, key=lambda each: self._engines[each].load)
        self._engines[name].sent += 1
        return name

    def _serves_model(self, info: EngineInfo) -> bool:
        if not self._models.isdisjoint(("", info.model)):
            return True
        if info.engine not in self._foreign:
            self._foreign.add(info.engine)
            wanted = " or ".join(sorted(self._models))
            logger.warning("engine %s serves %s, not %s: it gets no requests", info.engine, info.model, wanted)
        return False
