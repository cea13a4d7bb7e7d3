"""Bodies of Ollama's requests.

Fields of type Any are without effect by their definition. `options` are read by `conversion`, for those that are not
known are skipped, as Ollama does.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.openai.protocol import TopLogprobsCount
from llm_runtime.actors.ingress.openai.tools import Tool
from llm_runtime.actors.ingress.sampling import MinP, Penalty, RepetitionPenalty, SeedField, TopP

Temperature = Annotated[float, Meta(ge=0, le=1e6)]
TokenIdsOfContext = list[Annotated[int, Meta(ge=0, lt=2**31)]]
Limit = Annotated[int, Meta(ge=-2, lt=2**31)]


class Options(Struct, forbid_unknown_fields=True, kw_only=True):
    """How to sample. A limit of 0 or less is none."""

    temperature: Temperature | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    seed: SeedField = -1
    stop: str | list[str] | None = None
    num_predict: Limit | None = None
    repeat_penalty: RepetitionPenalty | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0


class Called(Struct, forbid_unknown_fields=True):
    """The function of a call."""

    name: str
    arguments: dict[str, Any] | str = {}
    index: Any = None


class Call(Struct, forbid_unknown_fields=True):
    """A call of a former turn."""

    function: Called
    id: str | None = None
    type: Any = None


class Message(Struct, forbid_unknown_fields=True):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    images: Any = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None
    name: str | None = None


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds have in common."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"tool_choice": ("auto",)}

    model: str
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    # without effect: the model stays loaded, and nothing is cut off a prompt that is too long
    keep_alive: Any = None
    shift: Any = None
    truncate: Any = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobsCount | None = None


class ChatBody(Request, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/chat."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class GenerateBody(Request, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/generate."""

    unsupported: ClassVar[tuple[str, ...]] = ("images", "template")

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: TokenIdsOfContext | None = None
    suffix: str | None = None


class Named(Struct, kw_only=True):
    """What requests about a model have in common: its name, in a new and an old form."""

    model: str = ""
    name: str = ""

    @property
    def asked(self) -> str:
        """The name. Raises ApiError if there is none."""
        if not (self.model or self.name):
            raise invalid("The request needs the name of a model.", "model")
        return self.model or self.name


class ShowBody(Named, kw_only=True):
    """Body of POST /api/show."""

    verbose: Any = None


class PullBody(Named, kw_only=True):
    """Body of POST /api/pull."""

    stream: bool | None = None


class EmbedBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/embed."""

    model: str
    input: str | list[str]
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    # without effect: the model stays loaded, and nothing is sampled
    keep_alive: Any = None
    options: Any = None


class EmbeddingsBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/embeddings, the former form of /api/embed."""

    model: str
    prompt: str = ""
    # without effect, as above
    keep_alive: Any = None
    options: Any = None
