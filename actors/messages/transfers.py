"""Between the actors of engines that prefill and engines that decode."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, TokenId, Trace
from llm_runtime.actors.messages.requests import SamplingParams
from llm_runtime.actors.messages.texts import TokenLogprob

# -- decode scheduler ↔ prefill scheduler --------------------------------------------------------------------------


TransferId = Annotated[str, Meta(min_length=1, max_length=256)]
"""Names one try to have one request's KV computed elsewhere. A decode scheduler never uses one twice."""
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Epoch = tuple[_Count, _Count]
"""Counts, at a KV sender, the times that a transfer was offered from the start: what was offered in an earlier epoch is
void. The epochs of a sender rise, those of a restarted one above those of the former: the first number is that by which
peers know its incarnation."""
NO_EPOCH = (0, 0)


class Prefill(AnyMessage):
    """Decode scheduler → prefill scheduler: compute the KV of a sequence and draw the token that follows. Repeated once
    a second until answered by `Prefilled` or `PrefillRefused`; a repetition makes the prefill engine say again
    what it has said. Finished pages are offered to the receiver meanwhile.

    Attributes:
        receiver: the KV receiver that takes the pages.
        tokens: prompt and output so far (i32). prompt_len: how many of them are the prompt.
        held: so many tokens, whole pages, have their KV on the decode side already; their pages are not offered.
        pages: where both engines compute in one arena, the pages of the whole sequence (i32), of which those of
            the `held` tokens are filled. Empty where the prefill engine uses pages of its own.
    """

    transfer: TransferId
    receiver: str
    tokens: bytes
    prompt_len: Annotated[int, Meta(ge=1, lt=2**31)]
    sampling: SamplingParams
    held: NonNegInt32 = 0
    pages: bytes = b""
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    extra_key: Annotated[str, Meta(max_length=1024)] = ""
    trace: Trace = b""


class Prefilled(AnyMessage):
    """Prefill scheduler → decode scheduler: the token that follows the sequence, None if none was asked for.

    Attributes:
        cached_tokens: tokens that were not computed, because the prefill engine had or was told their KV.
    """

    transfer: TransferId
    token: TokenId | None
    cached_tokens: NonNegInt32 = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class PrefillRefused(AnyMessage):
    """Prefill scheduler → decode scheduler: the sequence will not be computed; as `Refused`."""

    transfer: TransferId
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str


class Release(AnyMessage):
    """Decode scheduler → prefill scheduler: the transfer is over or no longer wanted; free what it holds. Repeated
    once a second until answered by `Released`, when no step writes into the transfer's pages any more."""

    transfer: TransferId


class Released(AnyMessage):
    """Prefill scheduler → decode scheduler: nothing is held for this transfer or written into its pages. Also without a
    `Release`, when the prefill engine has given the transfer up because nobody seemed to want it any more."""

    transfer: TransferId


# -- prefill scheduler ↔ KV sender ---------------------------------------------------------------------------------


class Offer(AnyMessage):
    """Prefill scheduler → KV sender: pages of a transfer hold their final KV. They stay as they are until the scheduler
    has been answered `Withdrawn`, or the decode side has given the transfer up.

    Attributes:
        first: index of the first of these pages in the sequence.
        pages: the pages (i32) in the arenas of the prefill engine's ranks.
    """

    transfer: TransferId
    receiver: str
    first: NonNegInt32
    pages: bytes
    trace: Trace = b""


class Withdraw(AnyMessage):
    """Prefill scheduler → KV sender: these transfers are over, or all of them if none is named. Answered by
    `Withdrawn`, after which no receiver gets to hear that what it has read of them was valid."""

    transfers: list[TransferId] = []


class Withdrawn(AnyMessage):
    """KV sender → prefill scheduler, with the transfers of the `Withdraw`."""

    transfers: list[TransferId] = []


# -- KV sender ↔ KV receiver ---------------------------------------------------------------------------------------


class Offered(AnyMessage):
    """KV sender → KV receiver: pages that may be read now. Offers may come again, and out of order.

    Attributes:
        endpoint: what is needed to read from the sender's arenas, a `SenderPages`.
        tp: arenas, one a rank, that hold a part each, or the same, of the pages.
    """

    transfer: TransferId
    first: NonNegInt32
    pages: bytes
    endpoint: bytes
    tp: NonNegInt32 = 1
    epoch: Epoch = NO_EPOCH


class Confirm(AnyMessage):
    """KV receiver → KV sender: all pages of the transfer have been read, as they were offered in one epoch; were they
    still there? Repeated once a second until answered by `Confirmed`."""

    transfer: TransferId
    epoch: Epoch = NO_EPOCH


class Confirmed(AnyMessage):
    """KV sender → KV receiver: whether the pages have been as they were offered all the time until now."""

    transfer: TransferId
    valid: bool
    epoch: Epoch = NO_EPOCH


# -- decode scheduler ↔ KV receiver --------------------------------------------------------------------------------


class Receive(AnyMessage):
    """Decode scheduler → KV receiver: take what is offered for a transfer. Repeated once a second; answered by
    `Received` or `ReceiveFailed` when it is complete.

    Attributes:
        sender: the KV sender of the prefill engine that was asked.
        first: index of the first page that is wanted. pages: where this and the following ones go (i32), as the
            ranks of the decode engine number them.
    """

    transfer: TransferId
    sender: str
    first: NonNegInt32
    pages: bytes
    trace: Trace = b""


class Received(AnyMessage):
    """KV receiver → decode scheduler: all pages of the transfer are in their places. `nbytes` were copied."""

    transfer: TransferId
    nbytes: Annotated[int, Meta(ge=0)] = 0


class ReceiveFailed(AnyMessage):
    """KV receiver → decode scheduler: the pages cannot be had any more. Nothing is written into them from now on."""

    transfer: TransferId
    reason: str


class CancelReceive(AnyMessage):
    """Decode scheduler → KV receiver: the transfer is not wanted. Repeated until answered by `ReceiveCancelled`."""

    transfer: TransferId


class ReceiveCancelled(AnyMessage):
    """KV receiver → decode scheduler: nothing is written into the transfer's pages any more."""

    transfer: TransferId
