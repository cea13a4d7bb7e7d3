"""What other actors are asked to do beside generating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.messages import (
    CacheFlushed,
    EndRequests,
    FlushCache,
    ListRequests,
    Message,
    Profile,
    Profiled,
    RequestsListed,
)

FLUSH_TIMEOUT_S = 10.0
PROFILE_TIMEOUT_S = 300.0
LIST_TIMEOUT_S = 1.0
ASK_AGAIN_S = 1.0

Answer = CacheFlushed | Profiled | RequestsListed


class Control:
    """Orders, and the answers to them. Only for the ingress's event loop.

    Args:
        send: puts a message into an actor's mailbox, by name.
        others: the other ingress workers.
    """

    def __init__(self, send: Callable[[str, Message], bool], others: Sequence[str]) -> None:
        self._send = send
        self._others = others
        self._answers: dict[str, dict[str, Answer]] = {}
        self._news = asyncio.Event()

    def end_elsewhere(self, name: str) -> None:
        """Has the other workers end requests; see `Service.end`."""
        for other in self._others:
            self._send(other, EndRequests(name))

    async def list_elsewhere(self) -> tuple[list[RequestsListed], list[str]]:
        """The requests of the other workers, and the names of those that do not answer, since they hang or restart."""
        rid = new_rid()

        def ask(missing: list[str]) -> None:
            for worker in missing:
                self._send(worker, ListRequests(rid))

        answers = await self._gather(rid, self._others, ask, LIST_TIMEOUT_S)
        silent = [worker for worker in self._others if worker not in answers]
        return [each for each in answers.values() if isinstance(each, RequestsListed)], silent

    async def flush(self, schedulers: Sequence[str]) -> list[str]:
        """Has schedulers forget what they have cached; the refusals of those that have not. Raises ApiError when one
        does not answer."""
        rid = new_rid()

        def ask(missing: list[str]) -> None:
            for scheduler in missing:
                self._send(scheduler, FlushCache(rid))

        answers = await self._ask(rid, schedulers, ask, FLUSH_TIMEOUT_S)
        return [each.refusal for each in answers if isinstance(each, CacheFlushed) and each.refusal]

    async def profile(self, ranks: Mapping[str, Sequence[str]], message: Profile) -> list[Profiled]:
        """Has ranks begin or end a profile; what each of them answers. Raises ApiError when one does not.

        Args:
            ranks: of each engine, by its scheduler.
        """

        def ask(missing: list[str]) -> None:
            for scheduler, names in ranks.items():
                if not set(names).isdisjoint(missing):
                    self._send(scheduler, message)

        every = [name for names in ranks.values() for name in names]
        answers = await self._ask(message.rid, every, ask, PROFILE_TIMEOUT_S)
        return [each for each in answers if isinstance(each, Profiled)]

    def answered(self, message: Answer, sender: str) -> None:
        """Somebody has answered; what nobody waits for any more is dropped."""
        answers = self._answers.get(message.rid)
        if answers is not None:
            answers[sender] = message
            self._news.set()

    async def _ask(
        self, rid: str, actors: Sequence[str], ask: Callable[[list[str]], None], limit_s: float
    ) -> list[Answer]:
        """The answers of all, in the order of `actors`. Raises ApiError when one does not answer."""
        answers = await self._gather(rid, actors, ask, limit_s)
        if missing := [each for each in actors if each not in answers]:
            raise ApiError(503, f"No answer of {', '.join(missing)} within {limit_s:g} seconds.")
        return [answers[each] for each in actors]

    async def _gather(
        self, rid: str, actors: Sequence[str], ask: Callable[[list[str]], None], limit_s: float
    ) -> dict[str, Answer]:
        """Asks until all have answered, or time is up. `ask` is given those that have not."""
        answers = self._answers[rid] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        try:
            while (missing := [each for each in actors if each not in answers]) and loop.time() < deadline:
                ask(missing)
                await self._wait(lambda: all(each in answers for each in actors))
        finally:
            del self._answers[rid]
        return answers

    async def _wait(self, done: Callable[[], bool]) -> None:
        """Until it is done, or time to ask again."""
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                while not done():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
