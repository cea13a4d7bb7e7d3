"""Between ingress and scheduler: requests, and what is done to an engine as a whole."""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, Rid, Seed, TokenId, Trace

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
    budget: NonNegInt32 | None = None
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
        max_repeats: an output ends whose last tokens are the same run of tokens so many times; 0 for never.
        checked: a constraint that must be one that can be kept; the tokens are not held to it. For a request without
            `constraint`.
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
    max_repeats: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    checked: Constraint | None = None

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


class Generate(AnyMessage):
    """Ingress → scheduler: produce tokens. Sent again, with a higher attempt and the tokens received so far, when the
    scheduler has been restarted. Answered by `Texts` of the detokenizer, or `Refused`.

    Attributes:
        prompt: token ids (i32).
        output: token ids (i32) that the ingress already has.
        characters: length of the text that the ingress already has for them.
        extra_key: the prefix tree shares pages only between requests with the same key.
        timeout_s: seconds that are left until the request is given up; 0 for no limit.
        whole: nobody reads the answer before it is complete, so its tokens may come in groups.
    """

    rid: Rid
    attempt: NonNegInt32
    prompt: bytes
    sampling: SamplingParams
    text: TextParams
    output: bytes = b""
    characters: NonNegInt32 = 0
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    extra_key: Annotated[str, Meta(max_length=1024)] = ""
    timeout_s: Annotated[float, Meta(ge=0)] = 0.0
    trace: Trace = b""
    whole: bool = False


class Abort(AnyMessage):
    """Ingress → scheduler or encoder: the client is gone or the time is up; free what the request holds. No answer."""

    rid: Rid


class Acknowledge(AnyMessage):
    """Ingress → scheduler: these requests have arrived whole; forget them."""

    rids: list[Rid]


class Resend(AnyMessage):
    """Ingress or detokenizer → scheduler: tokens of this request are missing. The scheduler hands the whole request
    to the detokenizer again, or answers the ingress with `Unknown`."""

    rid: Rid
    attempt: NonNegInt32


class Refused(AnyMessage):
    """Scheduler → ingress: the request will not be served; `status` is an HTTP status, `message` a sentence."""

    rid: Rid
    attempt: NonNegInt32
    status: Annotated[int, Meta(ge=400, le=599)]
    message: str
    retry_after_s: float = 0.0


class Unknown(AnyMessage):
    """Scheduler → ingress: no such request here. The ingress sends `Generate` again."""

    rid: Rid
    attempt: NonNegInt32


class FlushCache(AnyMessage):
    """Ingress → scheduler: forget the cached prefixes that no request uses. Answered by `CacheFlushed`; may be sent
    again."""

    rid: Rid


class CacheFlushed(AnyMessage):
    """Scheduler → ingress: done, or one sentence that says why not."""

    rid: Rid
    refusal: str = ""


Activity = Literal["CPU", "GPU"]


class Profile(AnyMessage):
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
    num_steps: NonNegInt32 = 0
    activities: list[Activity] = []
    record_shapes: bool = False
    with_stack: bool = False


class Profiled(AnyMessage):
    """Rank → ingress: the file in which the profile is, or will be once it has ended; or a sentence that says why there
    is none."""

    rid: Rid
    path: str = ""
    error: str = ""
