"""Continuous batching: which tokens of which requests the next step computes, and on which pages."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llm_runtime.actors.messages import PROMPT_LOGPROBS, SAMPLE, VERIFY
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.pages import PagePool
from llm_runtime.actors.scheduler.policies import POLICIES
from llm_runtime.actors.scheduler.request import BlockTable, Request
from llm_runtime.actors.scheduler.speculation import Speculation
from llm_runtime.actors.scheduler.step_times import StepTimes

LEAST_CHUNK = 32
"""Prompt tokens of a step however long decoding takes: else a full batch would starve those that wait."""
OPENING_BYTES = 4 * 2**20
"""What a step tells the ranks of requests that are new to them, if there are several: a message has a limit, and nobody
should wait for many long histories and biases."""
Place = Literal["here", "elsewhere", "nowhere"]
"""Where a prompt is computed: by this engine's ranks, by another engine, or nowhere for the moment."""


@dataclass(slots=True, eq=False)
class Row:
    """A run of new tokens of one request in one step, on the block_table that the request had at the time.

    Attributes:
        draft: those of the tokens, the last ones, that are guesses. While the row is under way, `Request.scheduled` and
            `Request.planned` count none of them.
    """

    request: Request
    block_table: BlockTable
    start: int
    length: int
    flags: int
    draft: tuple[int, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the request still runs on the row's block_table."""
        return self.request.block_table is self.block_table

    @property
    def draws(self) -> int:
        """How many tokens the rank draws for the row."""
        return len(self.draft) + 1 if self.flags & SAMPLE else 0


@dataclass(slots=True, eq=False)
class Departure:
    """A request whose prompt is to be computed elsewhere.

    Attributes:
        pages: what is lent for it.
        after: the step whose answer shows that nobody else writes into them any more.
    """

    request: Request
    block_table: BlockTable
    pages: list[int]
    after: int

    @property
    def wanted(self) -> bool:
        """Whether the request still waits for it, with these pages."""
        return self.request.away_on(self.block_table)


class Batch:
    """Requests that wait and requests that run, and the rules by which one becomes the other.

    A page freed here may be given away in the very next step although earlier steps still use it: ranks run steps in
    the order in which they were sent. One that is lent to others waits for these steps; see `Departure`.

    A step with drafts must be answered before the next one is asked for.

    Args:
        times: of steps so far, by which those with both prompts and decoding requests are kept short.
        speculation: chooses drafts; None for plain decoding.
        place: where the prompt of a request is computed that lacks the KV of so many tokens; None for always here.

    Attributes:
        chunk_tokens: prompt tokens of the next step, all requests together, and guesses.
        filled: whether prompts took all that the last step had for them and for guesses.
        departing: requests that have got pages, which are lent, to have their prompts computed elsewhere.
    """

    def __init__(
        self,
        config: Config,
        pool: PagePool,
        times: StepTimes,
        speculation: Speculation | None = None,
        place: Callable[[Request, int], Place] | None = None,
    ) -> None:
        self._config = config
        self._order = POLICIES.get(config.policy)
        self._pool = pool
        self._times = times
        self._speculation = speculation
        self._place = place
        self.departing: list[Departure] = []
        self._slots = list(range(config.max_running))[::-1]
        self.chunk_tokens = config.chunk_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.retractions = 0
        self.filled = False
        self._opening = 0  # bytes of what the next step tells of requests that are new to the ranks
        # Digests of prompt pages that running requests are about to fill. A waiting request that needs one of them is
        # admitted when it is done, and finds it in the tree.
        self._coming: Counter[bytes] = Counter()

    def next_rows(self, only: list[Request] | None = None) -> list[Row]:
        """The rows of the next step: one token for each decoding request, then prompt chunks within the budget, then
        guesses with what is left of it.

        Running requests go first, then waiting ones are admitted. When pages run out, the running request that comes
        last in urgency is retracted: it waits again and its tokens stay. With `only`, other requests have to pause.
        """
        rows: list[Row] = []
        self._opening = 0
        budget = self._budget()
        drafts: dict[Request, tuple[int, ...]] = {}
        if self._speculation is not None and only is None and not self.filled:
            drafts = self._speculation.choose(self.running)
        for request in list(self.running):
            if request.block_table is None or request.away:
                continue  # retracted for the sake of one before it, or computed elsewhere
            if only is not None and request not in only:
                continue
            if request.scheduled >= request.prompt_len and request.exhausted(self._config.max_model_len):
                continue
            if not request.block_table.opened and not self._opens(request):
                continue
            todo = request.planned - request.scheduled
            is_prompt = request.prefilling
            length = min(todo, budget) if is_prompt else todo
            if length > 0 and self._make_room(request, request.block_table, request.scheduled + length):
                rows.append(self._row(request, request.block_table, length))
                budget -= length if is_prompt else 0
        if only is None:
            budget = self._admit(rows, budget)
            self.filled = budget <= 0
            self._add_drafts(rows, drafts, budget)
        return rows

    def fits(self, requests: list[Request]) -> bool:
        """Whether one step can tell the ranks of all of these."""
        return len(requests) == 1 or sum(request.opening_bytes for request in requests) <= OPENING_BYTES

    def _opens(self, request: Request) -> bool:
        """Whether there is room in the next step for what the ranks have to be told of a request."""
        size = request.opening_bytes
        if self._opening and self._opening + size > OPENING_BYTES:
            return False
        self._opening += size
        return True

    def _add_drafts(self, rows: list[Row], drafts: dict[Request, tuple[int, ...]], budget: int) -> None:
        """Gives rows guesses to verify, as many as there are pages for without taking any from others."""
        for row in rows:
            draft = drafts.get(row.request, ())[: max(budget, 0)] if row.live else ()
            if draft and self._grow(row.block_table, row.start + row.length + len(draft)):
                row.draft, row.flags = draft, row.flags | VERIFY
                row.length += len(draft)
                budget -= len(draft)

    def _budget(self) -> int:
        """Prompt tokens, and guesses, that the next step may take.

        A longer step holds up all that decode for the sake of those that wait for their first token. Where more wait
        than decode, it may be so many times longer: of a burst, the first request does not make all others crawl.
        Those count that go before some that decode, or with them, and can be admitted: a longer step is nothing to
        others.
        """
        decoding = [request for request in self.running if not request.prefilling and not request.away]
        if not decoding or not self._config.max_step_ms:
            return self.chunk_tokens
        least = min(request.priority for request in decoding)
        waiting = sum(each.prefilling and not each.away and each.priority >= least for each in self.running)
        waiting += self._admissible(least)
        longest_s = self._config.max_step_ms / 1000 * max(1.0, waiting / len(decoding))
        most = self._times.most_tokens(longest_s, len(decoding) + self.chunk_tokens) - len(decoding)
        return min(self.chunk_tokens, max(most, LEAST_CHUNK))

    def _admissible(self, least: int) -> int:
        """How many of the requests that wait with at least this priority there are slots and pages for."""
        if not self.waiting or not self._slots:
            return 0
        room = self._pool.available - self._promised()
        count = 0
        for request in self.waiting:
            if request.priority < least:
                continue
            room -= -(-request.planned // self._pool.page_size) + 1
            if room < 0 or count == len(self._slots):
                break
            count += 1
        return count

    def _promised(self) -> int:
        """Pages that running requests still need, with one for what each decodes next."""
        return sum(
            max(1, -(-request.planned // self._pool.page_size) - len(request.block_table.pages))
            for request in self.running
            if request.block_table is not None
        )

    def admit_elsewhere(self) -> None:
        """Admits waiting requests whose prompts are computed elsewhere, whatever this engine's ranks are doing."""
        self._admit([], 0)

    def add(self, request: Request) -> None:
        """A request waits."""
        self.waiting.append(request)

    def computed(self, row: Row) -> None:
        """The rank has answered a row's step: its KV is in the pages, for the ledger and for other requests. Guesses
        that were wrong do not count to the row's length any more, and the request has the tokens of the others."""
        request, position, end = row.request, row.request.computed, row.start + row.length
        if not row.live or end <= position:
            return
        size, pages, write = self._pool.page_size, row.block_table.pages, self._pool.ledger.write
        while position < end:
            index, offset = divmod(position, size)
            stop = min(end, position - offset + size)
            write(pages[index], offset, request.tokens[position:stop], request.digests[index], index == 0)
            position = stop
        request.computed = end
        request.scheduled = max(request.scheduled, end)
        if row.length > 1 and not row.draft:
            self.share(request, row.block_table)

    def arrived(self, request: Request) -> None:
        """Others have computed the KV of all tokens of a request that was away."""
        block_table = request.block_table
        assert block_table is not None
        request.away = False
        start, end = request.computed, len(request.tokens)
        self._pool.keep(block_table.pages[request.shared :])
        self.computed(Row(request, block_table, start, end - start, 0))

    def release(self, request: Request) -> None:
        """Takes slot and pages from a running request; what is computed goes to the tree. Its tokens stay. Pages that
        are lent stay lent: who has lent them takes them back."""
        block_table = request.block_table
        if block_table is None:
            return
        self.share(request, block_table)
        self._coming.subtract(request.digests[1 + request.shared : 1 + request.prompt_len // self._pool.page_size])
        self._coming += Counter()
        if not request.away:
            self._pool.give_back(block_table.pages[request.shared :])
        if request.node is not None:
            self._pool.tree.unlock(request.node)
        self._slots.append(block_table.slot)
        self.running.remove(request)
        request.rewind()

    def remove(self, request: Request) -> None:
        """Forgets a request, waiting or running."""
        if request.block_table is None and request in self.waiting:
            self.waiting.remove(request)
        self.release(request)

    def _row(self, request: Request, block_table: BlockTable, length: int) -> Row:
        start, end = request.scheduled, request.scheduled + length
        flags = 0
        if end == request.planned and not request.exhausted(self._config.max_model_len):
            flags |= SAMPLE
            request.pending += 1
        if request.wants_prompt_logprobs and start < request.prompt_len:
            flags |= PROMPT_LOGPROBS
        request.scheduled = end
        return Row(request, block_table, start, length, flags)

    def _grow(self, block_table: BlockTable, end: int) -> bool:
        """Gives a block_table pages for `end` positions; False when there are not enough."""
        missing = -(-end // self._pool.page_size) - len(block_table.pages)
        if missing > 0:
            pages = self._pool.allocate(missing)
            if pages is None:
                return False
            block_table.pages += pages
        return True

    def _make_room(self, request: Request, block_table: BlockTable, end: int) -> bool:
        """Grows a block_table, retracting those that come last; False when the request had to be retracted itself."""
        while not self._grow(block_table, end):
            victim = self.running[-1]
            self.retract(victim)
            if victim is request:
                return False
        return True

    def retract(self, request: Request) -> None:
        """Back to those that wait, without slot and pages."""
        self.release(request)
        self.waiting.append(request)
        self.retractions += 1

    def _admit(self, rows: list[Row], budget: int) -> int:
        """Moves waiting requests to running while slots, pages and the prompt budget last; returns what is left of
        it."""
        if not self.waiting:
            return budget
        pool = self._pool
        promised = self._promised()
        for request in self._order(self.waiting, pool.tree):
            if not self._slots or (budget <= 0 and self._place is None):
                break
            if request.pending or request.held:
                continue  # retracted with a token under way: that comes first
            usable, known = b"", 0
            if pool.prefix_cache and not request.wants_prompt_logprobs:
                usable = request.tokens[:-1].tobytes()
                known = pool.tree.match_length(request.root, usable)
                if any(self._coming[digest] > 0 for digest in request.digests[known + 1 : known + 2]):
                    continue
            place = self._place(request, request.planned - known * pool.page_size) if self._place else "here"
            if place == "nowhere" or (place == "here" and (budget <= 0 or not self._opens(request))):
                continue
            # Pages that match stop being evictable, so they count as needed. One more for what is decoded next.
            needed = -(-request.planned // pool.page_size) + 1
            if self.running and promised + needed > pool.available:
                break
            block_table = self._start(request, usable)
            length = request.planned - request.scheduled
            if place == "here":
                length = min(length, budget)
            if not self._grow(block_table, request.scheduled + length):
                self.retract(request)
                break
            promised += max(1, needed - len(block_table.pages))
            if place == "here":
                rows.append(self._row(request, block_table, length))
                budget -= length
            else:
                self._send_away(request, block_table)
        return budget

    def _send_away(self, request: Request, block_table: BlockTable) -> None:
        """Others compute the prompt from its first page on that is not in the tree."""
        request.away = True
        request.computed = request.scheduled = request.shared * self._pool.page_size
        pages = block_table.pages[request.shared :]
        self._pool.lend(pages)
        self.departing.append(Departure(request, block_table, pages, self._pool.written_until(pages)))

    def _start(self, request: Request, usable: bytes) -> BlockTable:
        """Gives a waiting request a slot and the pages that hold its prefix already."""
        size = self._pool.page_size
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.urgency)
        request.node, pages = self._pool.match(request.root, usable)
        request.block_table = block_table = BlockTable(self._slots.pop(), list(pages))
        request.shared = len(pages)
        request.computed = request.scheduled = len(pages) * size
        taken = self._pool.take_partial(request.digests[len(pages)], usable[4 * request.computed :])
        if taken is not None:
            page, count = taken
            block_table.pages.append(page)
            request.computed += count
            request.scheduled += count
        if not request.output_len:
            request.cached_tokens = request.computed
        self._coming.update(request.digests[1 + request.shared : 1 + request.prompt_len // size])
        return block_table

    def share(self, request: Request, block_table: BlockTable) -> None:
        """Puts the full pages that a running request has computed into the tree, and takes over the tree's own where
        another request was faster."""
        pool = self._pool
        full = request.computed // pool.page_size
        if not pool.prefix_cache or full <= request.shared:
            return
        tokens = request.tokens[: full * pool.page_size].tobytes()
        node, pages = pool.tree.insert(request.root, tokens, block_table.pages[:full])
        pool.tree.lock(node)
        if request.node is not None:
            pool.tree.unlock(request.node)
        request.node = node
        doubles = [own for own, kept in zip(block_table.pages, pages, strict=False) if own != kept]
        if doubles:
            block_table.pages[:full] = pages
            block_table.pages_sent = min(block_table.pages_sent, request.shared)
            pool.give_back(doubles)
        prompt_pages = request.prompt_len // pool.page_size
        self._coming.subtract(request.digests[1 + request.shared : 1 + min(full, prompt_pages)])
        request.shared = full
