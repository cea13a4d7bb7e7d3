"""What other actors are asked to do beside generating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.ingress.errors import ApiError
from actors.ingress.pieces import new_rid
from actors.messages import CacheFlushed, EndRequests, FlushCache, Message

FLUSH_TIMEOUT_S = 10.0
ASK_AGAIN_S = 1.0


class Control:
    """Orders, and the answers to them. Only for the ingress's event loop.

    Args:
        send: puts a message into an actor's mailbox, by name.
        others: the other ingress workers.
    """

    def __init__(self, send: Callable[[str, Message], bool], others: Sequence[str]) -> None:
        self._send = send
        self._others = others
        self._answers: dict[str, dict[str, str]] = {}
        self._news = asyncio.Event()

    def end_elsewhere(self, name: str) -> None:
        """Has the other workers end requests; see `Service.end`."""
        for other in self._others:
            self._send(other, EndRequests(name))

    async def flush(self, schedulers: Sequence[str]) -> list[str]:
        """Has schedulers forget what they have cached; the refusals of those that have not. Raises ApiError when one
        does not answer."""
        rid = new_rid()
        answers = self._answers[rid] = {}
        deadline = asyncio.get_running_loop().time() + FLUSH_TIMEOUT_S
        try:
            while missing := [each for each in schedulers if each not in answers]:
                if asyncio.get_running_loop().time() > deadline:
                    raise ApiError(503, f"No answer of {', '.join(missing)} within {FLUSH_TIMEOUT_S:g} seconds.")
                for scheduler in missing:
                    self._send(scheduler, FlushCache(rid))
                await self._wait(lambda: len(answers) >= len(schedulers))
        finally:
            del self._answers[rid]
        return [refusal for refusal in answers.values() if refusal]

    def flushed(self, message: CacheFlushed, sender: str) -> None:
        """A scheduler has answered; what nobody waits for any more is dropped."""
        answers = self._answers.get(message.rid)
        if answers is not None:
            answers[sender] = message.refusal
            self._news.set()

    async def _wait(self, done: Callable[[], bool]) -> None:
        """Until it is done, or time to ask again."""
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                while not done():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
