"""Bodies of POST /v1/messages and /v1/messages/count_tokens.

Fields of type Any are without effect by their definition, or refused when they ask for anything.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from actors.ingress.openai.tools import ToolName
from actors.ingress.sampling import TopP


class Text(Struct, tag="text", forbid_unknown_fields=True):
    """Text."""

    text: str
    cache_control: Any = None
    citations: Any = None


class Thinking(Struct, tag="thinking", forbid_unknown_fields=True):
    """The model's reasoning of a former turn. The signature is not looked at."""

    thinking: str
    signature: str = ""
    cache_control: Any = None


class ToolUse(Struct, tag="tool_use", forbid_unknown_fields=True):
    """A call of a former turn."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None


class Image(Struct, tag="image"):
    """Refused."""


class Document(Struct, tag="document"):
    """Refused."""


class SearchResult(Struct, tag="search_result"):
    """Refused."""


class RedactedThinking(Struct, tag="redacted_thinking"):
    """Refused: nobody but its author can read it."""


Refused = Image | Document | SearchResult | RedactedThinking


class ToolResult(Struct, tag="tool_result", forbid_unknown_fields=True):
    """What a call has given."""

    tool_use_id: str
    content: str | list[Text | Image | Document | SearchResult] = ""
    is_error: bool | None = None
    cache_control: Any = None


Block = Text | Thinking | ToolUse | ToolResult | Image | Document | SearchResult | RedactedThinking


class Message(Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class ToolDefinition(Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool of the client. Those that Anthropic runs itself have another type, and are refused."""

    name: ToolName
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    cache_control: Any = None
    defer_loading: bool | None = None
    eager_input_streaming: Any = None
    input_examples: Any = None


class Choice(Struct, forbid_unknown_fields=True):
    """Whether tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Struct, forbid_unknown_fields=True):
    """Whether the model is to reason, and for how many tokens at most; the model does not learn of that. Budgets may be
    below Anthropic's least one of 1024, for small models, and above `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Any = None


class JSONFormat(Struct, forbid_unknown_fields=True):
    """A schema for the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    """The answer's form, and how much to reason."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSONFormat | None = None


class CountRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    # without effect on the answer
    cache_control: Any = None
    speed: Literal["standard"] | None = None
    # not supported
    context_management: Any = None
    mcp_servers: Any = None


class MessagesRequest(CountRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    top_p: TopP | None = None
    # without effect on the answer
    diagnostics: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    # not supported
    container: Any = None
