"""The requests that an encoder has been given, and what of them is computed next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llm_runtime.actors.encoder.config import MAX_SEQUENCES
from llm_runtime.actors.messages import TokenSequence

Request = tuple[str, str]
"""An ingress, and its name for a request."""


class Queue:
    """Sequences that wait, by request.

    Requests take turns, a sequence each, so a short one does not wait for the end of a long one.

    Attributes:
        max_tokens: of one batch, unless its first sequence alone has more.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._waiting: dict[Request, deque[TokenSequence]] = {}
        self._turns: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def put(self, request: Request, sequences: Sequence[TokenSequence]) -> None:
        """What a request waits for, in the place of all that it has waited for before."""
        if not sequences:
            self.drop(request)
            return
        if request not in self._waiting:
            self._turns.append(request)
        self._waiting[request] = deque(sequences)

    def drop(self, request: Request) -> None:
        """The request is not wanted any more."""
        if self._waiting.pop(request, None) is not None:
            self._turns.remove(request)

    def drop_of(self, ingress: str) -> None:
        """Nothing of this ingress is wanted any more."""
        for request in [each for each in self._waiting if each[0] == ingress]:
            self.drop(request)

    def take(self) -> list[tuple[Request, TokenSequence]]:
        """The next batch: the short sequences first; empty if nothing waits."""
        batch: list[tuple[Request, TokenSequence]] = []
        left = 4 * self.max_tokens
        while self._turns and len(batch) < MAX_SEQUENCES:
            request = self._turns[0]
            sequences = self._waiting[request]
            size = len(sequences[0].tokens)
            if batch and size > left:
                break
            left -= size
            batch.append((request, sequences.popleft()))
            self._turns.rotate(-1)
            if not sequences:
                self.drop(request)
        batch.sort(key=lambda each: len(each[1].tokens))
        return batch
