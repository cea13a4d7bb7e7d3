"""Body of POST /v1/responses.

Fields of type Any are without effect by their definition, or refused when they ask for anything.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from actors.ingress.openai.requests import ReasoningEffort
from actors.ingress.openai.tools import ToolName
from actors.ingress.sampling import TopP


class Text(Struct, forbid_unknown_fields=True):
    """A part of a message. All but the text is what an answer brings along."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: Any = None
    phase: Any = None
    status: Any = None


class FunctionCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: a call of a former turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Any = None
    caller: Any = None
    namespace: None = None
    parsed_arguments: Any = None
    status: Any = None


class FunctionCallOutput(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: what a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: Any = None
    caller: Any = None
    status: Any = None


class ReasoningText(Struct, forbid_unknown_fields=True):
    """A part of a reasoning item."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Struct, forbid_unknown_fields=True, kw_only=True):
    """An item: the reasoning of a former turn. The summary is not shown to the model."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: Any = None
    encrypted_content: None = None
    id: Any = None
    status: Any = None


class FunctionTool(Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that may be called."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Struct, forbid_unknown_fields=True):
    """A `tool_choice` that asks for a call of one function."""

    type: Literal["function"]
    name: str


class TextConfig(Struct, forbid_unknown_fields=True):
    """The answer's form."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Struct, forbid_unknown_fields=True):
    """How much to reason. Reasoning is given as it is, never as a summary."""

    effort: ReasoningEffort | None = None
    generate_summary: None = None
    summary: Literal["auto"] | None = None


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/responses."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    # without effect on the answer
    client_metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    stream_options: Any = None
    user: Any = None
    # not supported
    background: Any = None
    context_management: Any = None
    conversation: Any = None
    include: list[str] | None = None
    max_tool_calls: Any = None
    moderation: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    top_logprobs: Any = None
    truncation: Literal["disabled", "auto"] | None = None
