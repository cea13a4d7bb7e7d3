"""What a decode engine has asked of prefill engines: which of them, for which request, and into which pages."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_runtime.actors.messages import CancelReceive, EngineInfo, Message, Prefill, Prefilled, Receive, Release
from llm_runtime.actors.scheduler.batch import Place
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.pages import PagePool
from llm_runtime.actors.scheduler.request import BlockTable, Request

REPEAT_S = 1.0
"""What is not answered is said again after so long."""
GRACE_S = 5.0
"""How long a prefill engine is kept that the registry no longer lists."""
PATIENCE_S = 10.0
"""After so long without any prefill engine the decode engine computes prompts itself."""
MAX_FAILED = 3
"""After so many transfers whose KV got lost the decode engine computes a prompt itself."""
REMEMBERED_PAGES = 65_536
"""Pages of prompts sent to one prefill engine that are remembered, as it may still have their KV."""


@dataclass(slots=True, eq=False)
class Transfer:
    """A request whose prompt another engine computes.

    Attributes:
        pages: lent for it. tokens: that are to be computed.
        prefill, receive: what was asked, to be asked again. asked: when.
        answer: the token that follows. received: the KV is in the pages.
    """

    request: Request
    block_table: BlockTable
    scheduler: str
    pages: list[int]
    tokens: int
    prefill: Prefill
    receive: Receive
    asked: float
    answer: Prefilled | None = None
    received: bool = False

    @property
    def id(self) -> str:
        return self.prefill.transfer

    @property
    def wanted(self) -> bool:
        """Whether the request still waits for it, with these pages."""
        return self.request.away_on(self.block_table)


@dataclass(slots=True, eq=False)
class Settling:
    """A transfer that is over for this engine. Its pages are free again when all `peers` have said that they are done
    with it."""

    id: str
    peers: set[str]
    pages: list[int]


@dataclass(slots=True, eq=False)
class PrefillEngine:
    """A prefill engine.

    Attributes:
        seen: digests of prompt pages that it was sent, the latest last.
        tokens: that it has been asked for and has not computed yet.
    """

    info: EngineInfo
    listed: float
    seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    tokens: int = 0

    def cached(self, request: Request) -> int:
        """Pages at the beginning of a request that it has computed before."""
        pages = 0
        for digest in request.digests[1:]:
            if digest not in self.seen:
                break
            pages += 1
        return pages

    def note(self, request: Request) -> None:
        """Remembers the pages of a request that it is sent."""
        for digest in request.digests[1:]:
            self.seen[digest] = None
            self.seen.move_to_end(digest)
        while len(self.seen) > REMEMBERED_PAGES:
            self.seen.popitem(last=False)


class Transfers:
    """All transfers of one decode engine.

    Args:
        config: of the decode scheduler.
        name: of the decode scheduler. incarnation: of it, so that no transfer's id comes twice.
        send: sends a message to a peer.
        pool: takes the pages back.
    """

    def __init__(
        self, config: Config, name: str, incarnation: int, send: Callable[[str, Message], bool], pool: PagePool
    ) -> None:
        self._config = config
        self._prefix = f"{name}:{incarnation}"
        self._send = send
        self.pool = pool
        self._count = 0
        self._alone_since = time.monotonic()
        self.engines: dict[str, PrefillEngine] = {}
        self.active: dict[str, Transfer] = {}
        self.settling: list[Settling] = []
        if pool.lent_before:
            # Somebody may still be writing on behalf of the former incarnation.
            writers = set(config.prefill_schedulers) if config.shared_kv else {config.transfer}
            self._settle(f"{self._prefix}:former", writers, pool.lent_before)

    # -- choice -----------------------------------------------------------------------------------------

    def update(self, infos: list[EngineInfo]) -> list[Transfer]:
        """Takes in a registry; the transfers of engines that are gone."""
        now = time.monotonic()
        for info in infos:
            if info.role != "prefill" or info.model != self._config.model:
                continue
            known = self.engines.get(info.scheduler)
            if known is None:
                self.engines[info.scheduler] = PrefillEngine(info, now)
            else:
                known.info, known.listed = info, now
        gone = {name for name, engine in self.engines.items() if now - engine.listed > GRACE_S}
        for name in gone:
            del self.engines[name]
        if self.engines:
            self._alone_since = now
        return [transfer for transfer in self.active.values() if transfer.scheduler in gone]

    def place(self, request: Request, missing: int) -> Place:
        """Where a prompt is computed that lacks the KV of `missing` tokens."""
        if missing <= self._config.local_prefill_tokens or request.failed_transfers >= MAX_FAILED:
            return "here"
        if self._choose(request) is not None:
            return "elsewhere"
        return "here" if time.monotonic() - self._alone_since > PATIENCE_S else "nowhere"

    def _choose(self, request: Request) -> PrefillEngine | None:
        """The engine that will have computed the request first, going by the tokens that it has still to compute and by
        the pages of the prompt that it may have cached."""
        length = len(request.tokens)
        fit = [engine for engine in self.engines.values() if engine.info.max_model_len >= length]
        if not fit:
            return None
        size = self._config.page_size

        def cost(engine: PrefillEngine) -> tuple[int, int]:
            cached = 0 if self._config.shared_kv else engine.cached(request) * size
            return engine.tokens + length - cached, engine.info.waiting + engine.info.running

        return min(fit, key=cost)

    # -- transfers --------------------------------------------------------------------------------------

    def begin(self, request: Request, block_table: BlockTable) -> bool:
        """Asks for a request's prompt; False if there is no prefill engine."""
        engine = self._choose(request)
        if engine is None:
            return False
        self._count += 1
        transfer = f"{self._prefix}:{self._count}"
        trace = request.phases.context if request.phases is not None else b""
        first, base, info = request.shared, self._config.first_page, engine.info
        numbered = array("i", [base + page for page in block_table.pages])
        prefill = Prefill(
            transfer,
            self._config.transfer,
            request.tokens.tobytes(),
            request.prompt_len,
            request.sampling,
            first * self._config.page_size,
            numbered.tobytes() if self._config.shared_kv else b"",
            request.priority,
            request.extra_key,
            trace,
        )
        receive = Receive(transfer, info.transfer, first, numbered[first:].tobytes(), trace)
        tokens = len(request.tokens) - request.computed
        pages = block_table.pages[first:]
        self.active[transfer] = Transfer(
            request, block_table, info.scheduler, pages, tokens, prefill, receive, time.monotonic()
        )
        engine.tokens += tokens
        engine.note(request)
        self._send(self._config.transfer, receive)
        self._send(info.scheduler, prefill)
        return True

    def answered(self, message: Prefilled) -> Transfer | None:
        """The token of a transfer has arrived; the transfer if it is complete."""
        transfer = self.active.get(message.transfer)
        if transfer is None:
            return None
        if transfer.answer is None:
            self._unload(transfer)
            transfer.answer = message
        return self._complete(transfer)

    def received(self, id: str) -> Transfer | None:
        """The KV of a transfer has arrived; the transfer if it is complete."""
        transfer = self.active.get(id)
        if transfer is None:
            return None
        transfer.received = True
        return self._complete(transfer)

    def _complete(self, transfer: Transfer) -> Transfer | None:
        if transfer.answer is None or not transfer.received or not transfer.wanted:
            return None
        del self.active[transfer.id]
        self._settle(transfer.id, {transfer.scheduler}, [])
        return transfer

    def _unload(self, transfer: Transfer) -> None:
        engine = self.engines.get(transfer.scheduler)
        if engine is not None and transfer.answer is None:
            engine.tokens = max(0, engine.tokens - transfer.tokens)

    # -- ends -------------------------------------------------------------------------------------------

    def end_unwanted(self) -> None:
        """Ends the transfers of requests that have been retracted or forgotten."""
        for transfer in [transfer for transfer in self.active.values() if not transfer.wanted]:
            self._unload(transfer)
            del self.active[transfer.id]
            writers, readers = {transfer.scheduler}, {self._config.transfer}
            if not self._config.shared_kv:
                writers, readers = readers, writers
            self._settle(transfer.id, writers, transfer.pages)
            self._settle(transfer.id, readers, [])

    def done(self, peer: str, id: str) -> None:
        """A peer has nothing to do with a transfer any more."""
        for entry in [entry for entry in self.settling if entry.id == id]:
            self._leave(entry, peer)

    def restarted(self, peer: str) -> list[Transfer]:
        """A peer has been restarted and knows nothing of transfers; those that it was to compute."""
        for entry in list(self.settling):
            self._leave(entry, peer)
        if peer == self._config.transfer:
            self.repeat(0.0)
        return [transfer for transfer in self.active.values() if transfer.scheduler == peer]

    def repeat(self, after_s: float = REPEAT_S) -> None:
        """Asks again for what has not been answered in so long."""
        now = time.monotonic()
        for transfer in self.active.values():
            if now - transfer.asked >= after_s:
                transfer.asked = now
                if not transfer.received:
                    self._send(self._config.transfer, transfer.receive)
                self._send(transfer.scheduler, transfer.prefill)
        for entry in list(self.settling):
            if not entry.pages:
                # Nothing is lost here with an engine that is gone for good.
                entry.peers &= {*self.engines, self._config.transfer}
            self._ask(entry)
            if not entry.peers:
                self.settling.remove(entry)

    def _settle(self, id: str, peers: set[str], pages: list[int]) -> None:
        if not peers:
            self.pool.take_back(pages)
            return
        entry = Settling(id, peers, pages)
        self.settling.append(entry)
        self._ask(entry)

    def _ask(self, entry: Settling) -> None:
        for peer in entry.peers:
            self._send(peer, CancelReceive(entry.id) if peer == self._config.transfer else Release(entry.id))

    def _leave(self, entry: Settling, peer: str) -> None:
        entry.peers.discard(peer)
        if not entry.peers:
            self.settling.remove(entry)
            self.pool.take_back(entry.pages)
