"""Bodies of POST /v1/messages and /v1/messages/count_tokens.

Fields of type Any are without effect by their definition; docs/api.md lists them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.ingress.openai.tools import ToolName
from llm_runtime.actors.ingress.sampling import TopP

Effort = Literal["low", "medium", "high", "xhigh", "max"]


class Text(Struct, tag="text", forbid_unknown_fields=True):
    """Text. Its citations were made by another server, and say nothing to the model."""

    text: str
    cache_control: Any = None
    citations: Any = None


class Thinking(Struct, tag="thinking", forbid_unknown_fields=True):
    """The model's reasoning of a former turn. The signature is not looked at."""

    thinking: str
    signature: str | None = None
    cache_control: Any = None


class ToolUse(Struct, tag="tool_use", forbid_unknown_fields=True):
    """A call of a former turn."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None
    extra_content: Any = None
    provider_specific_fields: Any = None
    toolset_name: Any = None


class Image(Struct, tag="image"):
    """Refused."""


class Document(Struct, tag="document", forbid_unknown_fields=True):
    """A document; one that is text is shown to the model, any other is refused."""

    source: dict[str, Any]
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: Any = None


class SearchResult(Struct, tag="search_result", forbid_unknown_fields=True):
    """What a search of the client has found."""

    source: str
    title: str
    content: list[Text]
    citations: Any = None
    cache_control: Any = None


class ToolReference(Struct, tag="tool_reference", forbid_unknown_fields=True):
    """In the result of a client's search for tools: this one is to be shown from now on."""

    tool_name: str
    cache_control: Any = None


class ToolResult(Struct, tag="tool_result", forbid_unknown_fields=True):
    """What a call has given."""

    tool_use_id: str
    content: str | list[Text | Image | Document | SearchResult | ToolReference] | None = None
    is_error: bool | None = None
    cache_control: Any = None
    toolset_name: Any = None


class Compaction(Struct, tag="compaction"):
    """A summary of what was said before, which takes its place."""

    content: str | None = None


class ToolAddition(Struct, tag="tool_addition", forbid_unknown_fields=True):
    """In a system message: a tool is offered from here on."""

    tool: dict[str, Any]
    cache_control: Any = None


class ToolRemoval(Struct, tag="tool_removal", forbid_unknown_fields=True):
    """In a system message: a tool is no longer offered from here on."""

    tool: dict[str, Any]
    cache_control: Any = None


class RedactedThinking(Struct, tag="redacted_thinking"):
    """Skipped: nobody but its author can read it."""


class ToolSearchToolResult(Struct, tag="tool_search_tool_result"):
    """Skipped but for the tools that it names."""

    content: Any = None


class ServerToolUse(Struct, tag="server_tool_use"):
    """Skipped, as are the blocks below: what Anthropic's servers have done for a former turn."""


class WebSearchToolResult(Struct, tag="web_search_tool_result"):
    """Skipped."""


class WebFetchToolResult(Struct, tag="web_fetch_tool_result"):
    """Skipped."""


class CodeExecutionToolResult(Struct, tag="code_execution_tool_result"):
    """Skipped."""


class BashCodeExecutionToolResult(Struct, tag="bash_code_execution_tool_result"):
    """Skipped."""


class TextEditorCodeExecutionToolResult(Struct, tag="text_editor_code_execution_tool_result"):
    """Skipped."""


class AdvisorToolResult(Struct, tag="advisor_tool_result"):
    """Skipped."""


class MCPToolUse(Struct, tag="mcp_tool_use"):
    """Skipped."""


class MCPToolResult(Struct, tag="mcp_tool_result"):
    """Skipped."""


class MCPToolListing(Struct, tag="mcp_tool_listing"):
    """Skipped."""


class ContainerUpload(Struct, tag="container_upload"):
    """Skipped."""


class Fallback(Struct, tag="fallback"):
    """Skipped."""


OfServers = (
    ToolSearchToolResult
    | ServerToolUse
    | WebSearchToolResult
    | WebFetchToolResult
    | CodeExecutionToolResult
    | BashCodeExecutionToolResult
    | TextEditorCodeExecutionToolResult
    | AdvisorToolResult
    | MCPToolUse
    | MCPToolResult
    | MCPToolListing
    | ContainerUpload
    | Fallback
)

Block = (
    Text
    | Thinking
    | ToolUse
    | ToolResult
    | Image
    | Document
    | SearchResult
    | Compaction
    | ToolAddition
    | ToolRemoval
    | RedactedThinking
    | OfServers
)


class TurnOutput(Struct, forbid_unknown_fields=True):
    """What a system message says of the answer that follows it."""

    effort: Effort | None = None


class Message(Struct, forbid_unknown_fields=True):
    """One turn, or an instruction between two turns. Only system messages have the last two fields."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block] | None
    cache_control: Any = None
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: TurnOutput | None = None


class ToolDefinition(Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool of the client."""

    name: ToolName
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None


class Choice(Struct, forbid_unknown_fields=True):
    """Whether tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Struct, forbid_unknown_fields=True):
    """Whether the model is to reason, and for how many tokens at most; the model does not learn of that. Budgets may be
    below Anthropic's least one of 1024, for small models, and above `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None
    block_binding: Any = None


class JSONFormat(Struct, forbid_unknown_fields=True):
    """A schema for the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    """The answer's form, and how much to reason."""

    effort: Effort | None = None
    format: JSONFormat | None = None
    task_budget: Any = None


class Thread(Struct, forbid_unknown_fields=True):
    """Whether the server is to keep the conversation. It keeps none; see `endpoints`."""

    type: Literal["create", "continue"]
    previous_message_id: str | None = None


class InputTokens(Struct, tag="input_tokens", frozen=True, forbid_unknown_fields=True):
    """A number of tokens of the prompt."""

    value: Annotated[int, Meta(ge=0)]


class ToolUses(Struct, tag="tool_uses", frozen=True, forbid_unknown_fields=True):
    """A number of calls."""

    value: Annotated[int, Meta(ge=0)]


class ThinkingTurns(Struct, tag="thinking_turns", frozen=True, forbid_unknown_fields=True):
    """A number of turns."""

    value: Annotated[int, Meta(ge=1)]


class AllTurns(Struct, tag="all", frozen=True, forbid_unknown_fields=True):
    """All turns."""


class ClearToolUses(Struct, tag="clear_tool_uses_20250919", forbid_unknown_fields=True):
    """Old results of calls leave the conversation, with Anthropic's defaults."""

    trigger: InputTokens | ToolUses = InputTokens(100_000)
    keep: ToolUses = ToolUses(3)
    clear_at_least: InputTokens | None = None
    exclude_tools: list[str] | None = None
    clear_tool_inputs: bool | list[str] | None = None


class ClearThinking(Struct, tag="clear_thinking_20251015", forbid_unknown_fields=True):
    """Old reasoning leaves the conversation."""

    keep: Literal["all"] | ThinkingTurns | AllTurns = ThinkingTurns(1)


class Compact(Struct, tag="compact_20260112"):
    """Skipped: this server writes no summaries."""


class ContextManagement(Struct, forbid_unknown_fields=True):
    """What is left out of the conversation before the model sees it, in this order."""

    edits: list[ClearToolUses | ClearThinking | Compact] = []


class CountRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens. `tools` are read by `tools`, for those of Anthropic have fields of their
    own; `output_format` is a former name of `output_config.format`."""

    unsupported: ClassVar[tuple[str, ...]] = ("compaction", "container")

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JSONFormat | None = None
    context_management: ContextManagement | None = None
    mcp_servers: list[Any] | None = None
    speed: Literal["standard", "fast"] | None = None
    # without effect on the answer
    cache_control: Any = None
    betas: Any = None


class MessagesRequest(CountRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    top_p: TopP | None = None
    thread: Thread | None = None
    # without effect on the answer
    billing_policy: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
