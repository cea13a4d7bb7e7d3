"""Every message of the runtime, one module for the edges of a pair of roles.

A request is known by (rid, attempt): the ingress that owns it raises `attempt` each time it hands the request to a
scheduler again, and whoever knows a newer attempt drops what belongs to an older one. Packed arrays are little-endian:
`i32` stands for int32, `f32` for float32. Times are seconds.
"""

from llm_runtime.actors.messages.base import FinishReason, NonNegInt32, Rid, Seed, SpanId, Tagged, TokenId, Trace
from llm_runtime.actors.messages.common import ActorStats, Hello, SpanEnded
from llm_runtime.actors.messages.encoding import Embed, Embedded, EmbedRefused, TokenSequence
from llm_runtime.actors.messages.registry import EngineInfo, Register, RegisterRefused, Registry
from llm_runtime.actors.messages.requests import (
    MAX_CONSTRAINT,
    Abort,
    Acknowledge,
    Activity,
    CacheFlushed,
    Constraint,
    FlushCache,
    Generate,
    Marker,
    Profile,
    Profiled,
    Refused,
    Resend,
    SamplingParams,
    TextParams,
    Thinking,
    Unknown,
)
from llm_runtime.actors.messages.steps import (
    PROMPT_LOGPROBS,
    SAMPLE,
    VERIFY,
    Attach,
    Attached,
    Compile,
    Compiled,
    NewRequest,
    Step,
    StepRefused,
    StepResult,
    TopLogprobs,
)
from llm_runtime.actors.messages.texts import (
    OpenText,
    Stopped,
    TextEvent,
    TextLogprob,
    Texts,
    TokenEvent,
    TokenLogprob,
    Tokens,
)
from llm_runtime.actors.messages.tokenization import (
    ChatPrompt,
    DescribeTokenizer,
    Detokenize,
    Detokenized,
    FillPrompt,
    PairPrompt,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizeFailed,
    TokenizerDescribed,
)
from llm_runtime.actors.messages.transfers import (
    NO_EPOCH,
    CancelReceive,
    Confirm,
    Confirmed,
    Epoch,
    Offer,
    Offered,
    Prefill,
    Prefilled,
    PrefillRefused,
    Receive,
    ReceiveCancelled,
    Received,
    ReceiveFailed,
    Release,
    Released,
    TransferId,
    Withdraw,
    Withdrawn,
)
from llm_runtime.actors.messages.workers import MAX_LISTED, EndRequests, ListRequests, RequestInfo, RequestsListed

Message = (
    Hello
    | ActorStats
    | SpanEnded
    | Tokenize
    | Tokenized
    | TokenizeFailed
    | Detokenize
    | Detokenized
    | DescribeTokenizer
    | TokenizerDescribed
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
    | ListRequests
    | RequestsListed
    | Embed
    | Embedded
    | EmbedRefused
    | Compile
    | Compiled
    | Attach
    | Attached
    | Step
    | StepRefused
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

__all__ = [
    "MAX_CONSTRAINT",
    "MAX_LISTED",
    "NO_EPOCH",
    "PROMPT_LOGPROBS",
    "SAMPLE",
    "VERIFY",
    "Abort",
    "Acknowledge",
    "Activity",
    "ActorStats",
    "Attach",
    "Attached",
    "CacheFlushed",
    "CancelReceive",
    "ChatPrompt",
    "Compile",
    "Compiled",
    "Confirm",
    "Confirmed",
    "Constraint",
    "DescribeTokenizer",
    "Detokenize",
    "Detokenized",
    "Embed",
    "EmbedRefused",
    "Embedded",
    "EndRequests",
    "EngineInfo",
    "Epoch",
    "FillPrompt",
    "FinishReason",
    "FlushCache",
    "Generate",
    "Hello",
    "ListRequests",
    "Marker",
    "Message",
    "NewRequest",
    "NonNegInt32",
    "Offer",
    "Offered",
    "OpenText",
    "PairPrompt",
    "Prefill",
    "PrefillRefused",
    "Prefilled",
    "Profile",
    "Profiled",
    "Receive",
    "ReceiveCancelled",
    "ReceiveFailed",
    "Received",
    "Refused",
    "Register",
    "RegisterRefused",
    "Registry",
    "Release",
    "Released",
    "RequestInfo",
    "RequestsListed",
    "Resend",
    "Rid",
    "SamplingParams",
    "Seed",
    "SpanEnded",
    "SpanId",
    "Step",
    "StepRefused",
    "StepResult",
    "Stopped",
    "Tagged",
    "TextEvent",
    "TextLogprob",
    "TextParams",
    "TextPrompt",
    "Texts",
    "Thinking",
    "TokenEvent",
    "TokenId",
    "TokenLogprob",
    "TokenSequence",
    "Tokenize",
    "TokenizeFailed",
    "Tokenized",
    "TokenizerDescribed",
    "Tokens",
    "TopLogprobs",
    "Trace",
    "TransferId",
    "Unknown",
    "Withdraw",
    "Withdrawn",
]
