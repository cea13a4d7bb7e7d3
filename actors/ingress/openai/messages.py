"""Messages of a conversation, from what clients send to what chat templates know."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from llm_runtime.actors.ingress.decoding import asks_for_nothing, unknown
from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.messages import ChatPrompt

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Roles of messages, and what chat templates call them."""
_OWNERS = {
    "tool_calls": "assistant",
    "function_call": "assistant",
    "thought": "assistant",
    "tool_call_id": "tool",
}
"""Fields that only messages of one role have."""
_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
"""Types of content parts, and where their text is."""
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")
"""Types of content parts of an assistant that are its reasoning."""
_OF_ANSWERS = ("cache_control", "annotations", "extras", "id", "index", "logprobs", "signature")
"""Fields of content parts that answers and clients bring along, without effect."""

_encode = msgspec.json.encode


class CalledFunction(Struct, forbid_unknown_fields=True):
    """What a call in a message calls. Fields of type Any are what clients add to an answer."""

    name: str
    arguments: str | dict[str, Any] = ""
    parsed_arguments: Any = None
    provider_specific_fields: Any = None


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call in a message that is sent back. Fields of type Any are what clients add to an answer."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: Any = None
    cache_control: Any = None
    extra_content: Any = None
    provider_specific_fields: Any = None


class Thought(Struct):
    """A part of `reasoning_details` (OpenRouter's) or `thinking_blocks` (litellm's), of which only text is shown to the
    model."""

    text: str = ""
    thinking: str = ""
    summary: str = ""


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message. Fields of type Any are what clients send back of an answer, or add to it; they are without effect.

    `reasoning` and `reasoning_content` are two names of one thing.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("audio",)

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    function_call: CalledFunction | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[Thought] | None = None
    thinking_blocks: list[Thought] | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    annotations: Any = None
    cache_control: Any = None
    extra_content: Any = None
    id: Any = None
    parsed: Any = None
    provider_specific_fields: Any = None

    @property
    def text(self) -> str:
        """The content, whose parts are joined by a space, as SGLang does. Only after `chat_prompt` has checked it."""
        if isinstance(self.content, list):
            parts = (part for part in self.content if not _is_thought(part))
            return " ".join(part if isinstance(part, str) else part[_PARTS[part["type"]]] for part in parts)
        return self.content or self.refusal or ""

    @property
    def thought(self) -> str:
        """The reasoning, by whichever of its names."""
        parts = self.reasoning_details or self.thinking_blocks or ()
        whole = self.reasoning_content or self.reasoning
        whole = whole or "".join(part.text or part.thinking or part.summary for part in parts)
        if whole or self.role != "assistant":
            return whole
        return "".join(_thought(part) for part in self.content or ())


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _THOUGHTS


def _thought(part: Any) -> str:
    """The text of a content part that is reasoning, empty for any other."""
    thought = part.get(part["type"]) if _is_thought(part) else None
    if isinstance(thought, list):  # Mistral's
        return "".join(str(each.get("text") or "") for each in thought if isinstance(each, dict))
    return thought if isinstance(thought, str) else ""


def chat_prompt(
    messages: list[ChatMessage],
    template_arguments: dict[str, Any] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    tools: str = "",
    arguments_as_text: bool = False,
) -> ChatPrompt:
    """What the tokenizer renders. Raises ApiError for messages that are not text or make no conversation.

    Args:
        tools: the JSON text of a list.
        arguments_as_text: the template wants the arguments of calls as JSON text. Most want them as an object.
    """
    if not messages:
        raise invalid("Invalid value for 'messages': there must be at least one message.", "messages", "invalid_value")
    plain = [_plain(message, f"messages[{i}]", arguments_as_text) for i, message in enumerate(messages)]
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if continue_final_message:
        if add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        if plain[-1]["role"] != "assistant":
            raise invalid(
                "continue_final_message needs a last message with role 'assistant'.", "continue_final_message"
            )
    return ChatPrompt(
        messages=_encode(plain).decode(),
        tools=tools,
        template_arguments=_encode(template_arguments or {}).decode(),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def _plain(message: ChatMessage, param: str, arguments_as_text: bool) -> dict[str, Any]:
    """A message as chat templates know it."""
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid(
            f"Invalid value for '{param}.role': '{message.role}' is none of {', '.join(_ROLES)}.",
            f"{param}.role",
            "invalid_value",
        )
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(message.function_call))
    for field, owner in _OWNERS.items():
        if getattr(message, field) and role != owner:
            raise invalid(
                f"Invalid value for '{param}.{field}': only a message with role '{owner}' has it.",
                f"{param}.{field}",
                "invalid_value",
            )
    if message.content is None and role not in ("assistant", "tool"):
        raise invalid(
            f"Invalid value for '{param}.content': it must be a string or a list of text parts.",
            f"{param}.content",
            "invalid_value",
        )
    if isinstance(message.content, list):
        for i, part in enumerate(message.content):
            if not isinstance(part, str) and not (role == "assistant" and _is_thought(part)):
                _check_part(part, f"{param}.content[{i}]")
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.thought:
        plain["reasoning_content"] = message.thought
    if calls:
        plain["tool_calls"] = [_plain_call(call, arguments_as_text) for call in calls]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_call(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    """A call as chat templates know it. Arguments that a model has not written as an object are left a text, which some
    templates can show to it."""
    arguments = call.function.arguments
    if arguments_as_text:
        arguments = (arguments or "{}") if isinstance(arguments, str) else _encode(arguments).decode()
    elif isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            arguments = call.function.arguments
    plain: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id, **plain}


def _check_part(part: Any, param: str) -> None:
    """Raises ApiError for a part of a message that is not text."""
    if not isinstance(part, dict):
        raise invalid(f"Invalid value for '{param}': expected an object or a string.", param, "invalid_value")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        if isinstance(kind, str):
            raise unsupported(f"{param}.type", f"A content part of type '{kind}'")
        raise invalid(f"Invalid value for '{param}': a content part has a 'type'.", param, "invalid_value")
    field = _PARTS[kind]
    for key, value in part.items():
        if key not in ("type", field, *_OF_ANSWERS) and not asks_for_nothing(value):
            raise unknown(f"{param}.{key}", key, ["type", field])
    if not isinstance(part.get(field), str):
        raise invalid(f"Invalid value for '{param}.{field}': expected a string.", f"{param}.{field}", "invalid_value")
