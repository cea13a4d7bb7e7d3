"""Speculation: which guesses the next step verifies, if any.

A row that verifies holds a request's last token and guesses for those that follow. The rank draws a token at each of
its positions, with that position's random number; the guesses that equal what was drawn are accepted together with the
token after them, so that the output is the one of plain decoding. Only the time that it takes can differ.

Guesses are verified where that is expected to give more tokens a second than plain decoding does (goodput: Liu et al.
2024, "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput"), from the measured times of
steps by their size and from how often each request's guesses have been right. A step that verifies is not run ahead of,
since nobody knows yet where its requests go on, which costs a pause of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.drafters import DRAFTERS, Drafter
from llm_runtime.actors.scheduler.request import Request
from llm_runtime.actors.scheduler.step_times import StepTimes

GAIN = 1.05
"""Tokens a second, against plain decoding, that verifying has to promise."""
TRY_AGAIN = 128
"""One in so many good chances is taken although the measured times speak against it: they may be old."""
GOOD_CHANCE = 0.6
"""Chance of a guess that is worth a try then."""
LONGEST_RATIO = 2.0
"""A step that verifies may take `max_step_ms`, or so many times as long as plain decoding: streams shall flow."""
PAUSE_S = 0.0005
"""First estimate of how long ranks wait for a step that could not be sent ahead."""


class Speculation:
    """Decides on drafts and keeps count of them.

    Args:
        times: of steps so far; the scheduler keeps them.

    Attributes:
        draft_tokens, accepted_tokens, drafts: guesses verified, those that were right, and rows that held them.
    """

    def __init__(self, config: Config, times: StepTimes) -> None:
        self.times = times
        self._limit = config.num_speculative_tokens
        self._config, self._new_drafter = config, DRAFTERS.get(config.speculation)
        self._max_model_len = config.max_model_len
        self._pauses = int(config.run_ahead)
        self._longest_s = config.max_step_ms / 1000
        self.pause_s = PAUSE_S
        self._refusals = 0
        self._trial = False
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.drafts = 0

    def choose(self, running: Iterable[Request]) -> dict[Request, tuple[int, ...]]:
        """The guesses that the next step should verify; of requests of which no step is under way."""
        chosen = self._chosen([request for request in running if not request.pending and _decodes(request)], 0)
        if chosen:
            self._trial = False
        return {request: drafter.guess(count) for request, (drafter, count) in chosen.items()}

    def worth_waiting(self, running: Iterable[Request]) -> bool:
        """Whether the next step should wait for the answer of the one under way, to verify guesses then."""
        return bool(self._chosen([request for request in running if _decodes(request)], 1))

    def accepted(self, draft: Sequence[int], drawn: list[int]) -> list[int]:
        """Of the tokens drawn for a row those that count: the ones drawn after right guesses."""
        right = 0
        while right < len(draft) and draft[right] == drawn[right]:
            right += 1
        self.drafts += 1
        self.draft_tokens += len(draft)
        self.accepted_tokens += right
        return drawn[: right + 1]

    def observe_pause(self, seconds: float) -> None:
        """So long, beside its own work, it took to answer a step that the ranks had been waiting for."""
        self.pause_s += 0.1 * (min(max(seconds, 0.0), 4 * self.pause_s) - self.pause_s)

    def stats(self) -> dict[str, float]:
        """Figures since the scheduler's start. `spec_accept_length` counts the token that follows the guesses."""
        return {
            "spec_drafts": self.drafts,
            "spec_draft_tokens": self.draft_tokens,
            "spec_accepted_tokens": self.accepted_tokens,
            "spec_accept_rate": self.accepted_tokens / max(1, self.draft_tokens),
            "spec_accept_length": 1 + self.accepted_tokens / self.drafts if self.drafts else 0.0,
        }

    def _chosen(self, requests: list[Request], ahead: int) -> dict[Request, tuple[Drafter, int]]:
        """How many guesses of which requests should be verified, after `ahead` tokens that are still to come."""
        matches: list[tuple[Request, Drafter]] = []
        for request in requests:
            drafter = self._drafter(request)
            if drafter is not None and drafter.rate:
                matches.append((request, drafter))
        rows = len(requests)
        plain_s = self.times.seconds(rows)
        if not matches or not plain_s:
            return {}
        most = self._limit * len(matches)
        each_s = (self.times.seconds(rows + most) - plain_s) / most
        # A guess pays for itself if its chance is above its own time over the time of a token.
        needed = each_s * rows / plain_s
        longest_s = max(self._longest_s, LONGEST_RATIO * plain_s) if self._longest_s else math.inf
        most_each = (self.times.most_tokens(longest_s, rows + most) - rows) // len(matches)
        if self._trial:
            needed, most_each = min(needed, GOOD_CHANCE), self._limit
        gain, total = 0.0, 0
        chosen: dict[Request, tuple[Drafter, int]] = {}
        for request, drafter in matches:
            if drafter.rate < needed:
                continue
            chances = drafter.chances(min(self._room(request, ahead), most_each) + ahead)
            first = chances[0] if ahead and chances else 1.0
            useful = [chance for chance in chances[ahead:] if chance >= needed * first]
            if useful:
                chosen[request] = drafter, len(useful)
                gain += sum(useful)
                total += len(useful)
        pauses_s = self.pause_s * self._pauses * (1 + ahead)
        if self._trial or (rows + gain) * plain_s > GAIN * rows * (self.times.seconds(rows + total) + pauses_s):
            return chosen
        if ahead and any(drafter.rate >= GOOD_CHANCE for _, drafter in matches):
            self._refusals = (self._refusals + 1) % TRY_AGAIN
            self._trial = not self._refusals
        return {}

    def _drafter(self, request: Request) -> Drafter | None:
        """The request's drafter, brought up to its tokens; None if they are not guessed."""
        if not request.speculates:
            return None
        if request.drafter is None:
            request.drafter = self._new_drafter(request.tokens, self._config)
        request.drafter.follow()
        return request.drafter

    def _room(self, request: Request, ahead: int) -> int:
        """Most guesses for a request: with the token after them they must fit into what it may still have."""
        left = min(request.max_len, self._max_model_len) - len(request.tokens) - ahead
        return max(0, min(self._limit, left - 1))


def _decodes(request: Request) -> bool:
    """Whether the request's next row is a single token, as far as it is known."""
    return len(request.tokens) + request.pending - request.scheduled == 1 and not request.away
