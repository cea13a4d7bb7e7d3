"""Every message of the runtime, grouped by the edge it travels on.

A request is known by (rid, attempt): the ingress that owns it raises `attempt` each time it hands the request to a
scheduler again, and whoever knows a newer attempt drops what belongs to an older one. Packed arrays are little-endian:
`i32` stands for int32, `f32` for float32. Times are seconds.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Literal

from msgspec import Meta, Struct

Index = Annotated[int, Meta(ge=0, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rid = Annotated[str, Meta(min_length=1, max_length=128)]
FinishReason = Literal["stop", "length", "abort"]
Trace = Annotated[bytes, Meta(max_length=24)]
"""Trace id (16 bytes) and span id (8) of the span below which the receiver's spans belong; empty for a request that is
not traced. See `actors.spans`."""
SpanId = Annotated[bytes, Meta(max_length=8)]


class Tagged(Struct, tag=True, array_like=True, gc=False):
    """Base of all messages: a MessagePack array whose first item names the type."""


# -- any actor → its peers -----------------------------------------------------------------------------------------


class Hello(Tagged):
    """An actor → every peer, once it is ready: "what my former incarnation held is gone"."""


class ActorStats(Tagged):
    """An actor → every ingress, once a second: figures for /metrics."""

    incarnation: int
    figures: dict[str, float]


class SpanEnded(Tagged):
    """An actor → the ingress worker that exports it: what it did for a traced request, once that is over.

    Attributes:
        parent: span below which it belongs. start_ns, end_ns: since 1970. events: (nanoseconds since 1970, name).
        error: why it failed; empty if it did not.
    """

    trace: Annotated[bytes, Meta(min_length=16, max_length=16)]
    span: SpanId
    parent: SpanId
    name: Annotated[str, Meta(max_length=256)]
    start_ns: int
    end_ns: int
    attributes: dict[str, str | int | float | bool] = {}
    events: list[tuple[int, str]] = []
    error: str = ""


# -- ingress ↔ tokenizer -------------------------------------------------------------------------------------------


class ChatPrompt(Tagged):
    """Messages to render with the model's chat template; `messages` and `tools` are JSON texts."""

    messages: str
    tools: str = ""
    template_arguments: str = "{}"
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TextPrompt(Tagged):
    """A plain prompt, encoded as it is, with the model's own BOS token where it has one, and cut off behind
    `max_tokens` tokens unless that is 0; the special ones count."""

    text: str
    add_special_tokens: bool = True
    max_tokens: Index = 0


class PairPrompt(Tagged):
    """Two texts as a model reads them that compares them, encoded as one with the model's special tokens."""

    text: str
    pair: str
    max_tokens: Index = 0


class Tokenize(Tagged):
    """Ingress → tokenizer. Answered by `Tokenized` or `TokenizeFailed`. Repeated when the tokenizer is restarted."""

    rid: Rid
    prompt: ChatPrompt | TextPrompt | PairPrompt
    trace: Trace = b""


class Tokenized(Tagged):
    """Tokenizer → ingress: the prompt's token ids (i32), and of a pair the token type ids, one byte each."""

    rid: Rid
    tokens: bytes
    types: bytes = b""


class TokenizeFailed(Tagged):
    """Tokenizer → ingress: the prompt cannot be rendered or encoded; one sentence for the client."""

    rid: Rid
    error: str


class Detokenize(Tagged):
    """Ingress → tokenizer: the text of token ids (i32). Answered by `Detokenized` or `TokenizeFailed`."""

    rid: Rid
    tokens: bytes
    skip_special_tokens: bool = False


class Detokenized(Tagged):
    """Tokenizer → ingress: the whole text, and the text of each token alone."""

    rid: Rid
    text: str
    pieces: list[str]


# -- ingress ↔ scheduler -------------------------------------------------------------------------------------------


MAX_CONSTRAINT = 65_536
"""Characters of a constraint."""


class Constraint(Struct, array_like=True, frozen=True, gc=False):
    """What the text of an answer must look like.

    Attributes:
        text: a JSON schema, nothing for `json` (any JSON object), a regular expression, a grammar in EBNF whose first
            rule is `root`, a JSON list of strings for `choice`, or the JSON of a structural tag.
    """

    kind: Literal["json_schema", "json", "regex", "ebnf", "choice", "structural_tag"]
    text: Annotated[str, Meta(max_length=MAX_CONSTRAINT)] = ""

    @property
    def digest(self) -> str:
        """Names the constraint by its content."""
        return blake2b(f"{self.kind}:{self.text}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


Marker = Annotated[str, Meta(min_length=1, max_length=64)]
"""A text that stands at the beginning or the end of reasoning."""


class Thinking(Struct, array_like=True, frozen=True, gc=False):
    """Where the reasoning of an output is, and how long it may be. A constraint holds for what follows it.

    Attributes:
        ends: texts that end the reasoning.
        start: the text with which it begins, at the beginning of the output; empty if the prompt has ended with it, and
            the output begins inside.
        budget: tokens that the reasoning may have; None for any number.
        closing: token ids that are drawn one after the other once the budget is spent; they hold one of `ends`.
    """

    ends: Annotated[list[Marker], Meta(min_length=1, max_length=16)]
    start: Annotated[str, Meta(max_length=64)] = ""
    budget: Index | None = None
    closing: Annotated[list[TokenId], Meta(max_length=256)] = []


class SamplingParams(Struct, array_like=True, frozen=True, gc=False):
    """How the tokens of one request are drawn.

    Attributes:
        top_k: 0 keeps all tokens.
        stop_token_ids: ids that end the request, the model's end-of-sequence ids among them unless `ignore_eos`.
        logprobs: -1 for none, else how many of the most probable tokens are reported beside the drawn one.
        prompt_logprobs: the same for the prompt's tokens.
        constraint: only tokens are drawn with which the output can still become what it says.
        thinking: where the output reasons; None if that makes no difference.
    """

    max_tokens: Annotated[int, Meta(ge=0)]
    seed: Seed
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    stop_token_ids: list[TokenId] = []
    logit_bias: dict[TokenId, float] = {}
    logprobs: Annotated[int, Meta(ge=-1, le=128)] = -1
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=128)] = -1
    constraint: Constraint | None = None
    thinking: Thinking | None = None

    @property
    def penalizes(self) -> bool:
        """Whether tokens are less likely for having occurred."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def needs_history(self) -> bool:
        """Whether drawing a token needs the tokens before it."""
        return self.one_by_one or self.thinking is not None

    @property
    def one_by_one(self) -> bool:
        """Whether each token is drawn in a step of its own: the rank would have to go through the tokens before each
        position anew if these turned out to be others."""
        return self.penalizes or self.constraint is not None


class TextParams(Struct, array_like=True, frozen=True, gc=False):
    """How the tokens of one request become text.

    `no_stop_trim` leaves the matched stop string or stop token in the text. Stop strings are looked for in the text of
    the tokens from number `min_tokens` on.
    """

    stop: list[str] = []
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    min_tokens: Annotated[int, Meta(ge=0)] = 0


class Generate(Tagged):
    """Ingress → scheduler: produce tokens. Sent again, with a higher attempt and the tokens received so far, when the
    scheduler has been restarted. Answered by `Texts` of the detokenizer, or `Refused`.

    Attributes:
        prompt: token ids (i32).
        output: token ids (i32) that the ingress already has.
        characters: length of the text that the ingress already has for them.
        extra_key: the prefix tree shares pages only between requests with the same key.
        timeout_s: seconds that are left until the request is given up; 0 for no limit.
    """

    rid: Rid
    attempt: Index
    prompt: bytes
    sampling: SamplingParams
    text: TextParams
    output: bytes = b""
    characters: Index = 0
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    extra_key: Annotated[str, Meta(max_length=1024)] = ""
    timeout_s: Annotated[float, Meta(ge=0)] = 0.0
    trace: Trace = b""


class Abort(Tagged):
    """Ingress → scheduler or encoder: the client is gone or the time is up; free what the request holds. No answer."""

    rid: Rid


class Acknowledge(Tagged):
    """Ingress → scheduler: these requests have arrived whole; forget them."""

    rids: list[Rid]


class Resend(Tagged):
    """Ingress or detokenizer → scheduler: tokens of this request are missing. The scheduler hands the whole request
    to the detokenizer again, or answers the ingress with `Unknown`."""

    rid: Rid
    attempt: Index


class Refused(Tagged):
    """Scheduler → ingress: the request will not be served; `status` is an HTTP status, `message` a sentence."""

    rid: Rid
    attempt: Index
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str
    retry_after_s: float = 0.0


class Unknown(Tagged):
    """Scheduler → ingress: no such request here. The ingress sends `Generate` again."""

    rid: Rid
    attempt: Index


class FlushCache(Tagged):
    """Ingress → scheduler: forget the cached prefixes that no request uses. Answered by `CacheFlushed`; may be sent
    again."""

    rid: Rid


class CacheFlushed(Tagged):
    """Scheduler → ingress: done, or one sentence that says why not."""

    rid: Rid
    refusal: str = ""


Activity = Literal["CPU", "GPU"]


class Profile(Tagged):
    """Ingress → scheduler → rank 0 → the other ranks: begin a profile of the steps, or end it. Each rank answers the
    ingress with `Profiled`; may be sent again.

    Attributes:
        reply_to: the ingress that asks.
        name: begins the names of the files. output_dir: where they go; empty for the node's run directory.
        num_steps: after so many the profile ends by itself; 0 for when it is told to.
    """

    rid: Rid
    reply_to: str
    start: bool
    name: Annotated[str, Meta(pattern=r"^[0-9a-f-]*$", max_length=64)] = ""
    output_dir: Annotated[str, Meta(max_length=4096)] = ""
    num_steps: Index = 0
    activities: list[Activity] = []
    record_shapes: bool = False
    with_stack: bool = False


class Profiled(Tagged):
    """Rank → ingress: the file in which the profile is, or will be once it has ended; or a sentence that says why there
    is none."""

    rid: Rid
    path: str = ""
    error: str = ""


class EndRequests(Tagged):
    """Ingress → ingress: a client of one worker wants requests to end that another may have; all of them if `name` is
    empty. No answer."""

    name: Annotated[str, Meta(max_length=4096)] = ""


# -- scheduler ↔ grammar, rank -------------------------------------------------------------------------------------


class Compile(Tagged):
    """Scheduler → grammar: can this constraint be kept? Then → rank 0: have it ready. A rank that is asked for tokens
    before compiles it on the spot. Answered by `Compiled`, and repeated until it is."""

    constraint: Constraint


class Compiled(Tagged):
    """Grammar, rank 0 → scheduler: the constraint with this `digest` is ready, or why it cannot be kept: a sentence for
    the client."""

    digest: Annotated[str, Meta(max_length=64)]
    error: str = ""


# -- scheduler ↔ rank ----------------------------------------------------------------------------------------------


class Attach(Tagged):
    """Scheduler → rank 0, when either has been started: forget all slots and all steps sent before. Answered by
    `Attached` after the step under way has ended, so that from then on no page is written but by new steps.

    Rank 0 leads its group: the scheduler talks to it alone, and it passes `Attach` and `Step` on to the other ranks in
    the order in which it acts on them itself, so that all ranks always take part in the same collectives."""


class Attached(Tagged):
    """Rank 0 → scheduler: what the group runs, and that it is at rest.

    `fingerprint` names model, dtype and page format. `kv_epoch` changes when the contents of the KV pages were lost.
    """

    num_pages: Index
    page_size: Index
    max_slots: Index
    vocab_size: Index
    max_model_len: Index
    fingerprint: str
    kv_epoch: Index = 0


class OpenSlot(Struct, array_like=True, frozen=True, gc=False):
    """A request takes a slot of the rank's tables.

    Attributes:
        slot: row of the page table, the sampling parameters and the last-token table.
        prompt_len: tokens of the prompt; the token at position p ≥ prompt_len is output token p - prompt_len.
        history: prompt and output token ids so far (i32) if `sampling.needs_history`, else empty.
    """

    slot: Index
    prompt_len: Index
    sampling: SamplingParams
    history: bytes = b""
    trace: Trace = b""


SAMPLE = 1
"""Row flag of a step: draw the token that follows the row's last new token."""
PROMPT_LOGPROBS = 2
"""Row flag of a step: report the logprobs of the row's new tokens, each given the tokens before it. A row that does not
begin at position 0 must follow a row of the same slot that had the flag too and ended where it begins."""
VERIFY = 4
"""Row flag of a step, beside `SAMPLE`: draw a token after each of the row's new tokens, as if they had come one by one.
All of them are given, none is -1, and the slot's tokens are not drawn `one_by_one`. The slot's next row must not begin
with -1."""


class Step(Tagged):
    """Scheduler → rank 0 → the other ranks: one forward pass. Answered by rank 0 with `StepResult`.

    A row is a run of new tokens of one slot. The step reads the KV of positions [0, start) and writes
    [start, start + length), so it may be run again. Steps are run in the order of their numbers.

    Attributes:
        number: counts up from 1 within one incarnation of the scheduler.
        opens: slots to set up before the step.
        slots, starts, lengths: i32 a row. `starts` is the position of the row's first new token.
        flags: one byte a row, `SAMPLE | PROMPT_LOGPROBS | VERIFY`.
        tokens: i32, the new tokens of all rows one after the other; -1 stands for the token that the rank itself drew
            last for the slot, in an earlier step that is still unanswered when this one is sent.
        pages: i32 triples (slot, index in the slot's page table, page), set before the step.
    """

    number: Index
    slots: bytes
    starts: bytes
    lengths: bytes
    flags: bytes
    tokens: bytes
    pages: bytes = b""
    opens: list[OpenSlot] = []


class TopLogprobs(Struct, array_like=True, frozen=True, gc=False):
    """Logprobs for consecutive tokens of one row: of the tokens themselves (f32[k]) and of the `top` most probable ones
    (ids i32[k, top], values f32[k, top], most probable first)."""

    row: Index
    logprobs: bytes
    top: Index = 0
    top_ids: bytes = b""
    top_logprobs: bytes = b""


class StepResult(Tagged):
    """Rank 0 → scheduler: the tokens drawn in a step (i32), in row order: one for each row flagged SAMPLE, or as many
    as the row has new tokens if it is flagged VERIFY too.

    `logprobs` holds an entry for each token drawn for a slot that asked for them, in their order, and
    `prompt_logprobs` one for each row that asked for them. For prompt logprobs the entry's
    tokens are the row's new tokens, each given the tokens before it; the first token of a sequence has logprob NaN.
    """

    number: Index
    tokens: bytes
    logprobs: list[TopLogprobs] = []
    prompt_logprobs: list[TopLogprobs] = []
    duration_s: float = 0.0


# -- scheduler ↔ detokenizer ---------------------------------------------------------------------------------------


class TokenLogprob(Struct, array_like=True, frozen=True, gc=False):
    """Logprob of a token, and the most probable tokens at its place as (id, logprob)."""

    token: TokenId
    logprob: float | None
    top: list[tuple[TokenId, float]] = []


class OpenText(Struct, array_like=True, frozen=True, gc=False):
    """The detokenizer starts, or starts anew, with a request.

    Attributes:
        reply_to: the ingress that owns the request.
        base: output token ids (i32) that the ingress already has; their text is not sent again.
        characters: length of the text that the ingress already has.
    """

    rid: Rid
    attempt: Index
    reply_to: str
    text: TextParams
    stop_token_ids: list[TokenId] = []
    base: bytes = b""
    characters: Index = 0
    trace: Trace = b""


class TokenEvent(Struct, array_like=True, frozen=True, gc=False):
    """New output tokens of one request; `index` counts its output tokens from 0."""

    rid: Rid
    attempt: Index
    index: Index
    tokens: list[TokenId]
    finish: FinishReason | None = None
    cached_tokens: Index = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Tokens(Tagged):
    """Scheduler → detokenizer, one message a step: requests that start, new tokens, requests to forget."""

    events: list[TokenEvent]
    opens: list[OpenText] = []
    closes: list[Rid] = []


class Stopped(Tagged):
    """Detokenizer → scheduler: a stop string has been completed by output token `index`; draw no more."""

    rid: Rid
    attempt: Index
    index: Index


# -- detokenizer → ingress -----------------------------------------------------------------------------------------


class TextLogprob(Struct, array_like=True, frozen=True, gc=False):
    """Logprob of a token with the bytes it stands for, and the most probable tokens at its place."""

    token: TokenId
    token_bytes: bytes
    logprob: float | None
    top: list[tuple[TokenId, bytes, float]] = []


class TextEvent(Struct, array_like=True, frozen=True, gc=False):
    """New text of one request.

    Attributes:
        index: of the first of `tokens` among the output tokens.
        offset: position of `text`'s first character in the whole output text.
        stop_reason: the stop string or stop token id that ended the request, if one did.
    """

    rid: Rid
    attempt: Index
    index: Index
    tokens: list[TokenId]
    offset: Index
    text: str
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: Index = 0
    logprobs: list[TextLogprob] | None = None
    prompt_logprobs: list[TextLogprob] | None = None


class Texts(Tagged):
    """Detokenizer → ingress, one message a step for each ingress."""

    events: list[TextEvent]


# -- decode scheduler ↔ prefill scheduler --------------------------------------------------------------------------

TransferId = Annotated[str, Meta(min_length=1, max_length=256)]
"""Names one try to have one request's KV computed elsewhere. A decode scheduler never uses one twice."""
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Epoch = tuple[_Count, _Count]
"""Counts, at a KV sender, the times that a transfer was offered from the start: what was offered in an earlier epoch is
void. The epochs of a sender rise, those of a restarted one above those of the former: the first number is that by which
peers know its incarnation."""
NO_EPOCH = (0, 0)


class Prefill(Tagged):
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
    held: Index = 0
    pages: bytes = b""
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    extra_key: Annotated[str, Meta(max_length=1024)] = ""
    trace: Trace = b""


class Prefilled(Tagged):
    """Prefill scheduler → decode scheduler: the token that follows the sequence, None if none was asked for.

    Attributes:
        cached_tokens: tokens that were not computed, because the prefill engine had or was told their KV.
    """

    transfer: TransferId
    token: TokenId | None
    cached_tokens: Index = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class PrefillRefused(Tagged):
    """Prefill scheduler → decode scheduler: the sequence will not be computed; as `Refused`."""

    transfer: TransferId
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str


class Release(Tagged):
    """Decode scheduler → prefill scheduler: the transfer is over or no longer wanted; free what it holds. Repeated
    once a second until answered by `Released`, when no step writes into the transfer's pages any more."""

    transfer: TransferId


class Released(Tagged):
    """Prefill scheduler → decode scheduler: nothing is held for this transfer or written into its pages. Also without a
    `Release`, when the prefill engine has given the transfer up because nobody seemed to want it any more."""

    transfer: TransferId


# -- prefill scheduler ↔ KV sender ---------------------------------------------------------------------------------


class Offer(Tagged):
    """Prefill scheduler → KV sender: pages of a transfer hold their final KV. They stay as they are until the scheduler
    has been answered `Withdrawn`, or the decode side has given the transfer up.

    Attributes:
        first: index of the first of these pages in the sequence.
        pages: the pages (i32) in the arenas of the prefill engine's ranks.
    """

    transfer: TransferId
    receiver: str
    first: Index
    pages: bytes
    trace: Trace = b""


class Withdraw(Tagged):
    """Prefill scheduler → KV sender: these transfers are over, or all of them if none is named. Answered by
    `Withdrawn`, after which no receiver gets to hear that what it has read of them was valid."""

    transfers: list[TransferId] = []


class Withdrawn(Tagged):
    """KV sender → prefill scheduler, with the transfers of the `Withdraw`."""

    transfers: list[TransferId] = []


# -- KV sender ↔ KV receiver ---------------------------------------------------------------------------------------


class Offered(Tagged):
    """KV sender → KV receiver: pages that may be read now. Offers may come again, and out of order.

    Attributes:
        endpoint: what is needed to read from the sender's arenas, a `SenderPages`.
        tp: arenas, one a rank, that hold a part each, or the same, of the pages.
    """

    transfer: TransferId
    first: Index
    pages: bytes
    endpoint: bytes
    tp: Index = 1
    epoch: Epoch = NO_EPOCH


class Confirm(Tagged):
    """KV receiver → KV sender: all pages of the transfer have been read, as they were offered in one epoch; were they
    still there? Repeated once a second until answered by `Confirmed`."""

    transfer: TransferId
    epoch: Epoch = NO_EPOCH


class Confirmed(Tagged):
    """KV sender → KV receiver: whether the pages have been as they were offered all the time until now."""

    transfer: TransferId
    valid: bool
    epoch: Epoch = NO_EPOCH


# -- decode scheduler ↔ KV receiver --------------------------------------------------------------------------------


class Receive(Tagged):
    """Decode scheduler → KV receiver: take what is offered for a transfer. Repeated once a second; answered by
    `Received` or `ReceiveFailed` when it is complete.

    Attributes:
        sender: the KV sender of the prefill engine that was asked.
        first: index of the first page that is wanted. pages: where this and the following ones go (i32), as the
            ranks of the decode engine number them.
    """

    transfer: TransferId
    sender: str
    first: Index
    pages: bytes
    trace: Trace = b""


class Received(Tagged):
    """KV receiver → decode scheduler: all pages of the transfer are in their places. `nbytes` were copied."""

    transfer: TransferId
    nbytes: Annotated[int, Meta(ge=0)] = 0


class ReceiveFailed(Tagged):
    """KV receiver → decode scheduler: the pages cannot be had any more. Nothing is written into them from now on."""

    transfer: TransferId
    reason: str


class CancelReceive(Tagged):
    """Decode scheduler → KV receiver: the transfer is not wanted. Repeated until answered by `ReceiveCancelled`."""

    transfer: TransferId


class ReceiveCancelled(Tagged):
    """KV receiver → decode scheduler: nothing is written into the transfer's pages any more."""

    transfer: TransferId


# -- ingress ↔ encoder ---------------------------------------------------------------------------------------------


class Sequence(Struct, array_like=True, frozen=True, gc=False):
    """One input of a model that embeds or classifies.

    Attributes:
        place: its place among the inputs of the request.
        tokens: token ids (i32). types: token type ids, one byte a token, or nothing for zeros.
    """

    place: Index
    tokens: bytes
    types: bytes = b""


class Embed(Tagged):
    """Ingress → encoder: make a vector of each sequence. Repeated, with the sequences that are not yet answered, when
    the encoder is restarted or silent; what is sent again takes the place of what the encoder has of the request.
    Answered by `Embedded`, or `EmbedRefused`; given up with `Abort`."""

    rid: Rid
    sequences: list[Sequence]


class Embedded(Tagged):
    """Encoder → ingress: vectors (f32, one after the other) of the sequences at these places (i32)."""

    rid: Rid
    places: bytes
    vectors: bytes


class EmbedRefused(Tagged):
    """Encoder → ingress: the request will not be served; as `Refused`."""

    rid: Rid
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str
    retry_after_s: float = 0.0


# -- scheduler → bootstrap → ingress, scheduler --------------------------------------------------------------------


class EngineInfo(Struct, array_like=True, frozen=True, gc=False):
    """What an engine offers. `scheduler` is the name and `address` the mailbox of the actor that takes its requests (on
    other machines than its own, the address that the topology gives holds); `transfer` the KV sender of a prefill
    engine or the KV receiver of a decode engine."""

    engine: str
    role: Literal["unified", "prefill", "decode"]
    scheduler: str
    address: str
    model: str
    fingerprint: str
    tp: Index
    page_size: Index
    num_pages: Index
    max_model_len: Index
    waiting: Index = 0
    running: Index = 0
    transfer: str = ""


class Register(Tagged):
    """Scheduler → bootstrap, once a second and when either has been started."""

    engine: EngineInfo


class RegisterRefused(Tagged):
    """Bootstrap → scheduler: the engine is not listed; one sentence says why and what to do."""

    reason: str


class Registry(Tagged):
    """Bootstrap → every ingress and decode scheduler, when an engine comes, goes or changes, and once a second."""

    engines: list[EngineInfo]


Message = (
    Hello
    | ActorStats
    | SpanEnded
    | Tokenize
    | Tokenized
    | TokenizeFailed
    | Detokenize
    | Detokenized
    | Generate
    | Abort
    | Acknowledge
    | Resend
    | Refused
    | Unknown
    | FlushCache
    | CacheFlushed
    | Profile
    | Profiled
    | EndRequests
    | Embed
    | Embedded
    | EmbedRefused
    | Compile
    | Compiled
    | Attach
    | Attached
    | Step
    | StepResult
    | Tokens
    | Stopped
    | Texts
    | Prefill
    | Prefilled
    | PrefillRefused
    | Release
    | Released
    | Offer
    | Withdraw
    | Withdrawn
    | Offered
    | Confirm
    | Confirmed
    | Receive
    | Received
    | ReceiveFailed
    | CancelReceive
    | ReceiveCancelled
    | Register
    | RegisterRefused
    | Registry
)
"""All types that may travel in an envelope."""
