"""A request as the scheduler knows it: tokens, progress, pages."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_runtime.actors.messages import FinishReason, Generate, TokenEvent, TokenLogprob
from llm_runtime.actors.scheduler.drafters import Drafter
from llm_runtime.actors.scheduler.pages import page_digest, root_digest
from llm_runtime.actors.scheduler.radix import Node

if TYPE_CHECKING:
    from llm_runtime.actors.scheduler.phases import Phases


REPEATED_TOKENS = 64
"""The longest run of tokens that is looked for at the end of an output that may only repeat itself."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """A running request's slot and pages.

    Attributes:
        pages: page of each run of `page_size` positions.
        opened: whether the rank knows the slot's parameters.
        pages_sent: how many of the pages the rank knows.
    """

    slot: int
    pages: list[int]
    opened: bool = False
    pages_sent: int = 0


class Request:
    """State of one request. All of it can be made again from its `Generate`.

    Positions count the tokens of prompt and output together. The tokens at [0, computed) have their KV in pages, as
    answered by the rank; those at [0, scheduled) will have once all steps sent are answered; `pending` tokens have been
    asked for and not arrived yet, so the sequence ends at `planned`.

    Attributes:
        owner: the ingress that sent it.
        order: rank of arrival, for first come first served.
        tokens: prompt and output (i32). max_len: how many there may be.
        digests: digest of the prefix before page 0, 1, 2 …; one entry more than there are full pages known.
        block_table: slot and pages while it runs; the first `shared` pages belong to the prefix tree.
        node: end of the path in the prefix tree that is locked for this request.
        away: its prompt is being computed by another engine, into pages that are lent.
        held: it waits for its constraint to be ready.
        phases: what it is at, if it is traced. trace: context that came with it.
        arrived: monotonic time. admitted: whether it has had a slot.
        failed_transfers: how often its KV was computed by another engine and got lost.
        speculates: whether its next tokens may be guessed. Not with penalties or a constraint.
        drafter: guesses its next tokens; None until it is wanted.
        events: what has been sent to the detokenizer, kept until the ingress acknowledges.
        room: tokens that the output may have in the end, if others compute the rest; 0 if not.
        whole: its tokens need not be sent as they come. A stop string, though, is to be found at once.
        kept, kept_logprobs: those that have not been sent.
    """

    def __init__(self, message: Generate, owner: str, order: int, page_size: int) -> None:
        self.rid = message.rid
        self.attempt = message.attempt
        self.owner = owner
        self.order = order
        self.priority = message.priority
        self.extra_key = message.extra_key
        self.sampling = message.sampling
        self.stop_token_ids = frozenset(message.sampling.stop_token_ids)
        self.text = message.text
        self.base = message.output
        self.characters = message.characters
        self.arrived = time.monotonic()
        self.deadline = self.arrived + message.timeout_s if message.timeout_s else None
        self.trace = message.trace
        self.phases: Phases | None = None
        self.admitted = False
        self.tokens = array("i", message.prompt + message.output)
        self.prompt_len = len(message.prompt) // 4
        self.room = 0
        self.max_len = self.prompt_len + message.sampling.max_tokens
        self.page_size = page_size
        self.digests = [root_digest(message.extra_key)]
        self.extend_digests()

        self.block_table: BlockTable | None = None
        self.shared = 0
        self.node: Node | None = None
        self.away = False
        self.held = False
        self.failed_transfers = 0
        self.speculates = not message.sampling.one_by_one
        self.drafter: Drafter | None = None
        self.computed = 0
        self.scheduled = 0
        self.pending = 0
        self.cached_tokens = 0
        self.events: list[TokenEvent] = []
        self.whole = message.whole and not message.text.stop
        self.kept: list[int] = []
        self.kept_logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish: FinishReason | None = None

    @property
    def root(self) -> bytes:
        """Digest of the empty prefix under the request's extra key."""
        return self.digests[0]

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts the request that goes first to the front: by priority, then by arrival."""
        return (-self.priority, self.order)

    @property
    def output_len(self) -> int:
        """Output tokens that have arrived."""
        return len(self.tokens) - self.prompt_len

    @property
    def planned(self) -> int:
        """Length of the sequence once all steps sent are answered."""
        return len(self.tokens) + self.pending

    @property
    def prefilling(self) -> bool:
        """Whether more than its last token is still to be sent."""
        return self.scheduled < len(self.tokens) - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of the prompt are still to be computed for this request."""
        return self.sampling.prompt_logprobs >= 0 and not self.output_len

    def exhausted(self, max_model_len: int) -> bool:
        """Whether the tokens asked for so far are all it may have."""
        planned = self.planned
        return planned >= self.max_len or planned >= max_model_len

    def away_on(self, block_table: BlockTable) -> bool:
        """Whether it waits for its prompt to be computed by another engine, into the pages of this block_table."""
        return self.away and self.block_table is block_table

    def append(self, token: int) -> None:
        """Takes an output token."""
        self.tokens.append(token)
        if len(self.tokens) % self.page_size == 0:
            self.extend_digests()

    @property
    def opening_bytes(self) -> int:
        """About how large the message is that tells the ranks of the request."""
        sampling = self.sampling
        constraint = len(sampling.constraint.text) if sampling.constraint is not None else 0
        history = 4 * len(self.tokens) if sampling.needs_history else 0
        return 12 * len(sampling.logit_bias) + constraint + history

    @property
    def repeats(self) -> bool:
        """Whether the output's last tokens are the same run of tokens as often as ends it. As this is a function of the
        output alone, an answer that is made again ends in the same place."""
        count, tokens = self.sampling.max_repeats, self.tokens
        length = len(tokens) - self.prompt_len
        if not count or length < self.sampling.min_tokens or self.sampling.constraint is not None:
            return False  # a constraint may want repetition, and its answers end by themselves
        for size in range(1, min(REPEATED_TOKENS, length // count) + 1):
            if tokens[-1] == tokens[-1 - size] and tokens[-size * count : -size] == tokens[-size * (count - 1) :]:
                return True
        return False

    def extend_digests(self) -> None:
        """Brings `digests` up to the full pages of `tokens`."""
        size = self.page_size
        while len(self.digests) <= len(self.tokens) // size:
            at = (len(self.digests) - 1) * size
            self.digests.append(page_digest(self.digests[-1], self.tokens[at : at + size].tobytes()))

    def rewind(self) -> None:
        """Back to a request without slot and pages; the tokens stay."""
        self.block_table = None
        self.shared = 0
        self.node = None
        self.away = False
        self.computed = 0
        self.scheduled = 0
        if not self.output_len:
            self.prompt_logprobs = []
