"""Between scheduler, ranks and grammar actor: constraints to compile, and steps to compute."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, Trace
from llm_runtime.actors.messages.requests import Constraint, SamplingParams

# -- scheduler ↔ grammar, rank -------------------------------------------------------------------------------------


class Compile(AnyMessage):
    """Scheduler → grammar: can this constraint be kept? Then → rank 0: have it ready. A rank that is asked for tokens
    before compiles it on the spot. Answered by `Compiled`, and repeated until it is."""

    constraint: Constraint


class Compiled(AnyMessage):
    """Grammar, rank 0 → scheduler: the constraint with this `digest` is ready, or why it cannot be kept: a sentence for
    the client."""

    digest: Annotated[str, Meta(max_length=64)]
    error: str = ""


# -- scheduler ↔ rank ----------------------------------------------------------------------------------------------


class Attach(AnyMessage):
    """Scheduler → rank 0, when either has been started: forget all slots and all steps sent before. Answered by
    `Attached` after the step under way has ended, so that from then on no page is written but by new steps.

    Rank 0 leads its group: the scheduler talks to it alone, and it passes `Attach` and `Step` on to the other ranks in
    the order in which it acts on them itself, so that all ranks always take part in the same collectives."""


class Attached(AnyMessage):
    """Rank 0 → scheduler: what the group runs, and that it is at rest.

    `fingerprint` names model, dtype and page format. `kv_epoch` changes when the contents of the KV pages were lost.
    """

    num_pages: NonNegInt32
    page_size: NonNegInt32
    max_slots: NonNegInt32
    vocab_size: NonNegInt32
    max_model_len: NonNegInt32
    fingerprint: str
    kv_epoch: NonNegInt32 = 0


class NewRequest(Struct, array_like=True, frozen=True, gc=False):
    """A request takes a slot of the rank's tables.

    Attributes:
        slot: row of the page table, the sampling parameters and the last-token table.
        prompt_len: tokens of the prompt; the token at position p ≥ prompt_len is output token p - prompt_len.
        history: prompt and output token ids so far (i32) if `sampling.needs_history`, else empty.
        room: tokens that the output may have in the end, whoever computes them; 0 for `sampling.max_tokens`.
    """

    slot: NonNegInt32
    prompt_len: NonNegInt32
    sampling: SamplingParams
    history: bytes = b""
    trace: Trace = b""
    room: NonNegInt32 = 0


SAMPLE = 1
"""Row flag of a step: draw the token that follows the row's last new token."""
PROMPT_LOGPROBS = 2
"""Row flag of a step: report the logprobs of the row's new tokens, each given the tokens before it. A row that does not
begin at position 0 must follow a row of the same slot that had the flag too and ended where it begins."""
VERIFY = 4
"""Row flag of a step, beside `SAMPLE`: draw a token after each of the row's new tokens, as if they had come one by one.
All of them are given, none is -1, and the slot's tokens are not drawn `one_by_one`. The slot's next row must not begin
with -1."""


class Step(AnyMessage):
    """Scheduler → rank 0 → the other ranks: one forward pass. Answered by rank 0 with `StepResult` or
    `StepRefused`.

    A row is a run of new tokens of one slot. The step reads the KV of positions [0, start) and writes
    [start, start + length), so it may be run again. Steps are run in the order of their numbers.

    Attributes:
        number: counts up from 1 within one incarnation of the scheduler.
        new_requests: slots to set up before the step.
        slots, starts, lengths: i32 a row. `starts` is the position of the row's first new token.
        flags: one byte a row, `SAMPLE | PROMPT_LOGPROBS | VERIFY`.
        tokens: i32, the new tokens of all rows one after the other; -1 stands for the token that the rank itself drew
            last for the slot, in an earlier step that is still unanswered when this one is sent.
        pages: i32 triples (slot, index in the slot's page table, page), set before the step.
    """

    number: NonNegInt32
    slots: bytes
    starts: bytes
    lengths: bytes
    flags: bytes
    tokens: bytes
    pages: bytes = b""
    new_requests: list[NewRequest] = []


class TopLogprobs(Struct, array_like=True, frozen=True, gc=False):
    """Logprobs for consecutive tokens of one row: of the tokens themselves (f32[k]) and of the `top` most probable ones
    (ids i32[k, top], values f32[k, top], most probable first)."""

    row: NonNegInt32
    logprobs: bytes
    top: NonNegInt32 = 0
    top_ids: bytes = b""
    top_logprobs: bytes = b""


class StepResult(AnyMessage):
    """Rank 0 → scheduler: the tokens drawn in a step (i32), in row order: one for each row flagged SAMPLE, or as many
    as the row has new tokens if it is flagged VERIFY too.

    `logprobs` holds an entry for each token drawn for a slot that asked for them, in their order, and
    `prompt_logprobs` one for each row that asked for them. For prompt logprobs the entry's
    tokens are the row's new tokens, each given the tokens before it; the first token of a sequence has logprob NaN.
    """

    number: NonNegInt32
    tokens: bytes
    logprobs: list[TopLogprobs] = []
    prompt_logprobs: list[TopLogprobs] = []
    duration_s: float = 0.0


class StepRefused(AnyMessage):
    """Rank 0 → scheduler, in place of `StepResult`: the step makes no sense, and nothing of it was computed.

    Attributes:
        slots: those whose rows, pages or parameters are to blame; none if the rank cannot tell.
        reason: one sentence.
    """

    number: NonNegInt32
    slots: list[NonNegInt32]
    reason: str
