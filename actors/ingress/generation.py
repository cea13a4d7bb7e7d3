"""The requests to an engine that one HTTP request makes: a choice for each prompt and each of its n answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from msgspec import structs

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange, Write
from llm_runtime.actors.ingress.ledger import Entry, Ledger
from llm_runtime.actors.ingress.output_deltas import OutputDelta
from llm_runtime.actors.ingress.work import Work
from llm_runtime.actors.messages import SamplingParams, TextParams

MAX_SEED = 2**63 - 1

Render = Callable[[list[Entry]], bytes]
"""Makes events of the choices that have news."""


class Generation:
    """The choices of one HTTP request, in the order prompt by prompt. Leaving the `with` block aborts those that
    have not finished.

    What an earlier incarnation of this worker has received comes first: the choices then go to an engine with it.

    Args:
        model: what engines must serve; empty for any.
        work: the request's identity and what is known of it; choices are known to engines as `rid/0`, `rid/1` …, a
            single one as `rid`.
        prompts: token ids (i32) of each prompt, and how many tokens its answers may have.
        n: answers to each prompt; the i-th one draws with the seed plus i.
        cache_report: whether `cached_tokens` tells what was cached.
        eager: whether `progress` gives what has arrived, or waits until everything has.
    """

    def __init__(
        self,
        ledger: Ledger,
        work: Work,
        prompts: Sequence[tuple[bytes, int]],
        sampling: SamplingParams,
        text: TextParams,
        *,
        timeout_s: float,
        n: int = 1,
        priority: int = 0,
        extra_key: str = "",
        eager: bool = False,
        cache_report: bool = True,
        model: str = "",
    ) -> None:
        identity = work.identity
        rid, arrived_at = identity.rid, identity.arrived_at
        single = len(prompts) * n == 1
        self.entries = [
            Entry(
                rid if single else f"{rid}/{i * n + j}",
                i * n + j,
                prompt,
                structs.replace(sampling, max_tokens=max_tokens, seed=(sampling.seed + j) & MAX_SEED),
                text,
                self,
                arrived_at,
                arrived_at + timeout_s,
                priority,
                extra_key,
                work.trace,
                model,
                not eager,
            )
            for i, (prompt, max_tokens) in enumerate(prompts)
            for j in range(n)
        ]
        self._ledger = ledger
        self._work = work
        self._eager = eager
        self.cache_report = cache_report
        self._n = n
        self._unfinished = len(self.entries)
        self._ready: dict[Entry, None] = {}  # an ordered set
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._direct: tuple[Render, Write] | None = None
        self._writes_soon = False

    def __enter__(self) -> Generation:
        if not self._work.old:
            self._submit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for entry in self.entries:
            if entry.finish is None:
                self._ledger.abort(entry)

    @property
    def finished(self) -> bool:
        """Whether all choices have arrived whole."""
        return not self._unfinished

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens, counted once for all answers to a prompt."""
        return sum(entry.prompt_tokens for entry in self.entries[:: self._n])

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache, counted like `prompt_tokens`; 0 if that is not to be
        told."""
        return sum(entry.cached_tokens for entry in self.entries[:: self._n]) if self.cache_report else 0

    @property
    def completion_tokens(self) -> int:
        """Output tokens of all choices so far."""
        return sum(len(entry.output) for entry in self.entries)

    async def progress(self) -> list[Entry]:
        """Waits for news; gives the choices that have any. Raises ApiError when one of them fails.

        Of what is known from an earlier incarnation, all that was put into the answer comes at once, and at first.
        """
        if self._work.old:
            self._recall()
        if not self._ready and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        return self._take_ready()

    async def stream(self, exchange: Exchange, render: Render) -> None:
        """Sends the events that `render` makes of the choices that have news, until all choices have been sent whole.

        While the client keeps up, news is written in the loop's round in which it arrives, by a callback: a switch to
        the request's task and back would cost as much as everything else that an event takes.
        """
        while self._ready or self._failure is not None or not self.finished:
            data = render(await self.progress())
            if data:
                await exchange.events(data)
            write = exchange.writer
            if write is not None and not (self._work.old or self._ready or self.finished):
                self._direct = render, write
                try:
                    await self._wait()
                finally:
                    self._direct = None

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take_ready(self) -> list[Entry]:
        ready, self._ready = list(self._ready), {}
        self._work.cover()
        return ready

    def _write_directly(self) -> None:
        """Wakes the request's task only when there is something for it to do."""
        self._writes_soon = False
        if self._direct is None or not self._ready:
            return
        render, write = self._direct
        try:
            data = render(self._take_ready())
            keeps_up = not data or write(data)
        except Exception as error:
            self._failure = error
            keeps_up = False
        if not keeps_up or self.finished:
            self._wake()

    def _recall(self) -> None:
        for index, delta in self._work.old.pop(0):
            entry = self.entries[index]
            entry.append(delta)
            self.progressed(entry)
        if not self._work.old:
            self._submit()

    def _submit(self) -> None:
        for entry in self.entries:
            if entry.finish is None:
                entry.attempt = self._work.next_attempt(entry.index)
                self._ledger.submit(entry)

    # -- called by the ledger -------------------------------------------------------------------------------------

    def received(self, entry: Entry, delta: OutputDelta) -> None:
        """See `Listener`."""
        self._work.received(entry.index, delta)

    def attempted(self, entry: Entry) -> None:
        """See `Listener`."""
        self._work.attempted(entry.index, entry.attempt)

    def progressed(self, entry: Entry) -> None:
        """See `Listener`."""
        if entry.finish is not None:
            self._unfinished -= 1
        if self._eager:
            self._ready[entry] = None
            if self._direct is None:
                self._wake()
            elif not self._writes_soon:
                self._writes_soon = True
                asyncio.get_running_loop().call_soon(self._write_directly)
        elif not self._unfinished:
            self._ready = dict.fromkeys(self.entries)
            self._wake()

    def failed(self, entry: Entry, error: ApiError) -> None:
        """See `Listener`."""
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
