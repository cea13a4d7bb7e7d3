"""Body of POST /v1/responses.

Fields of type Any are without effect by their definition.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.ingress.openai.requests import ReasoningEffort
from llm_runtime.actors.ingress.openai.tools import ToolName
from llm_runtime.actors.ingress.sampling import MinP, Penalty, RepetitionPenalty, SeedField, TokenLimit, TopK, TopP


class Text(Struct, forbid_unknown_fields=True):
    """A part of a message. All but the text is what an answer brings along, or clients add."""

    type: Literal["input_text", "output_text", "text", "summary_text"]
    text: str
    cache_control: Any = None
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]] | None
    type: Literal["message"] = "message"
    id: Any = None
    phase: Any = None
    status: Any = None


class Refusal(Struct, forbid_unknown_fields=True):
    """A part of a message: that the model does not answer."""

    type: Literal["refusal"]
    refusal: str


class FunctionCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a call of a former turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str | dict[str, Any] | None
    id: Any = None
    caller: Any = None
    namespace: Any = None
    parsed_arguments: Any = None
    status: Any = None


class FunctionCallOutput(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: what a call has given."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[dict[str, Any]] | None
    id: Any = None
    caller: Any = None
    name: Any = None
    status: Any = None


class CustomCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a call of a former turn whose argument is a text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    id: Any = None
    caller: Any = None
    namespace: Any = None
    status: Any = None


class ItemReference(Struct, forbid_unknown_fields=True):
    """An item: one of an answer that is kept."""

    id: str
    type: Literal["item_reference"] = "item_reference"


class ReasoningText(Struct, forbid_unknown_fields=True):
    """A part of a reasoning item."""

    type: Literal["reasoning_text", "text"]
    text: str
    annotations: Any = None


class ReasoningItem(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: the reasoning of a former turn. A summary, and what another server has encrypted, are not shown to the
    model."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: Any = None
    encrypted_content: Any = None
    format: Any = None
    id: Any = None
    signature: Any = None
    status: Any = None


class ShellCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a command that the client's machine has run for a former turn."""

    type: Literal["local_shell_call", "shell_call"]
    call_id: str
    action: dict[str, Any]
    created_by: Any = None
    environment: Any = None
    id: Any = None
    status: Any = None


class ShellCallOutput(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: what it has given."""

    type: Literal["local_shell_call_output", "shell_call_output"]
    output: str | list[Any]
    call_id: str | None = None
    created_by: Any = None
    id: str | None = None
    max_output_length: Any = None
    status: Any = None


class FunctionTool(Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that may be called."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    # without effect: what is to be searched for first is shown at once
    cache_control: Any = None
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None

    @staticmethod
    def reshaped(value: dict[str, Any]) -> dict[str, Any]:
        """A tool in the shape that chats have."""
        inner = value.get("function")
        others = {name: each for name, each in value.items() if name != "function"}
        return {**inner, **others} if isinstance(inner, dict) else value


class NamedFunction(Struct, forbid_unknown_fields=True):
    """A `tool_choice` that asks for a call of one function."""

    type: Literal["function"]
    name: str

    @staticmethod
    def reshaped(value: dict[str, Any]) -> dict[str, Any]:
        """A choice in the shape that chats have."""
        return FunctionTool.reshaped(value)


class AllowedTools(Struct, forbid_unknown_fields=True):
    """A `tool_choice` that leaves some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


Summary = Literal["auto", "concise", "detailed"]


class TextConfig(Struct, forbid_unknown_fields=True):
    """The answer's form."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Struct, forbid_unknown_fields=True):
    """How much to reason. Reasoning is given as it is, whichever summary is asked for."""

    effort: ReasoningEffort | None = None
    generate_summary: Summary | None = None
    summary: Summary | None = None


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/responses."""

    unsupported: ClassVar[tuple[str, ...]] = (
        "background",
        "moderation",
        "prompt",
        "top_logprobs",
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"top_logprobs": (0,)}

    input: str | list[dict[str, Any]] = []
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: TokenLimit | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: SeedField | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    context_management: list[Any] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    # without effect on the answer
    client_metadata: Any = None
    max_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    stream_options: Any = None
    user: Any = None
    # not supported
    conversation: Any = None
