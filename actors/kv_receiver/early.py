"""Offers that arrive before the scheduler has said where their pages go."""

from __future__ import annotations

import time
from collections import deque

from llm_runtime.actors.kv_receiver.transfer import Pages

MAX_PAGES = 2**20
KEPT_S = 10.0


class EarlyOffers:
    """Keeps offers for some seconds, and only so many pages: those of long ago go first."""

    def __init__(self) -> None:
        self._offers: dict[tuple[str, str], list[Pages]] = {}
        self._order: deque[tuple[float, tuple[str, str], Pages]] = deque()
        self._pages = 0

    def __len__(self) -> int:
        return len(self._order)

    def keep(self, sender: str, transfer: str, offer: Pages) -> None:
        """Keeps an offer of a sender."""
        key = sender, transfer
        self._offers.setdefault(key, []).append(offer)
        self._order.append((time.monotonic(), key, offer))
        self._pages += 1 + len(offer.pages)
        self.forget_old()

    def take(self, sender: str, transfer: str) -> list[Pages]:
        """The offers of a transfer, in their order; they are no longer kept."""
        return self._offers.pop((sender, transfer), [])

    def forget_old(self) -> None:
        """Forgets what is too old or too much."""
        oldest = time.monotonic() - KEPT_S
        while self._order and (self._order[0][0] < oldest or self._pages > MAX_PAGES):
            _, key, offer = self._order.popleft()
            self._pages -= 1 + len(offer.pages)
            kept = self._offers.get(key, [])
            if kept and kept[0] is offer:
                del kept[0]
                if not kept:
                    del self._offers[key]
