"""Finds the request that kills its rank every time, or makes it refuse its steps, so that it alone fails.

A rank that dies is restarted and gets its step again. When the same requests have been in the unanswered step at
`limit` deaths in a row, one of them may be the cause: the step's requests are split and the parts run alone, a part
that is answered is cleared, a part during which the rank dies is split again, until a single request is left.
"""

from __future__ import annotations

from collections import Counter

from llm_runtime.actors.scheduler.request import Request


class Bisection:
    """Deaths of ranks by request, and the parts of a suspect batch that are still to be tried.

    Args:
        limit: deaths in a row, without an answered step between, that make a request suspect.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._deaths: Counter[Request] = Counter()
        self._parts: list[list[Request]] = []

    @property
    def on_trial(self) -> list[Request] | None:
        """The only requests that the next step may compute; None when all may."""
        while self._parts:
            self._parts[-1] = [request for request in self._parts[-1] if request.finish is None]
            if self._parts[-1]:
                return self._parts[-1]
            self._parts.pop()
        return None

    def answered(self, requests: list[Request]) -> None:
        """A step with these requests went well."""
        for request in requests:
            self._deaths.pop(request, None)
        if self._parts and set(self._parts[-1]) & set(requests):
            self._parts.pop()

    def refused(self, requests: list[Request]) -> Request | None:
        """The ranks refused a step with these requests, without saying which of them is to blame: as `died`, but there
        is no use in a second try of all together."""
        return self._suspect(requests, split=True)

    def died(self, requests: list[Request]) -> Request | None:
        """The ranks died with these requests in the unanswered step. The one that is to blame, once it is found."""
        self._deaths.update(requests)
        return self._suspect(requests, max((self._deaths[request] for request in requests), default=0) >= self._limit)

    def _suspect(self, requests: list[Request], split: bool) -> Request | None:
        if self._parts:
            part = self._parts.pop()
            if len(part) == 1:
                del self._deaths[part[0]]
                return part[0]
            self._split(part)
        elif split:
            self._split(requests)
        return None

    def _split(self, requests: list[Request]) -> None:
        half = len(requests) // 2
        self._parts += [part for part in (requests[half:], requests[:half]) if part]
