"""Has the recent requests written down when an actor crashes."""

from __future__ import annotations

import asyncio
import logging

from llm_runtime.actors.ingress.recent import SETTLE_S, Death, RecentRequests, Record

logger = logging.getLogger(__name__)


class CrashDumps:
    """Watches the incarnations of all actors that this worker hears of. Only for the ingress's event loop."""

    def __init__(self, recent: RecentRequests) -> None:
        self._recent = recent
        self._suspects: dict[str, int] = {}
        self._writing: asyncio.Task[None] | None = None

    def peer_started(self, peer: str, incarnation: int) -> None:
        """The first frame of an incarnation has arrived."""
        former = self._recent.started(peer, incarnation)
        if former is not None:
            self.suspect(peer, former)

    def suspect(self, actor: str, incarnation: int) -> None:
        """An incarnation is gone: was it a crash? Looked at in a moment, with others that have died with it."""
        self._suspects.setdefault(actor, incarnation)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._dump())

    async def _dump(self) -> None:
        while self._suspects:
            await asyncio.sleep(SETTLE_S)
            suspects, self._suspects = self._suspects, {}
            deaths = self._recent.deaths(suspects)
            records = self._recent.snapshot() if deaths else []
            if records:
                await asyncio.get_running_loop().run_in_executor(None, self._write, deaths, records)

    def _write(self, deaths: list[Death], records: list[Record]) -> None:
        who = ", ".join(f"{death.actor} ({death.reason})" for death in deaths)
        try:
            path = self._recent.write(deaths, records)
        except OSError as error:
            logger.error("the requests at the crash of %s cannot be written down: %s", who, error)
        else:
            logger.warning("after the crash of %s %d requests were written to %s", who, len(records), path)
