"""Messages of a conversation, from what clients send to what chat templates know."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from actors.ingress.errors import invalid, unsupported
from actors.messages import ChatPrompt

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of messages, and what chat templates call them."""

_encode = msgspec.json.encode


class CalledFunction(Struct, forbid_unknown_fields=True):
    """What a call in a message calls. `parsed_arguments` is what OpenAI's client adds to an answer."""

    name: str
    arguments: str | dict[str, Any] = ""
    parsed_arguments: Any = None


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call in a message that is sent back."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: Any = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message. Fields of type Any are what clients send back of an answer, and are empty then, but for `parsed`,
    which OpenAI's client adds to an answer."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    parsed: Any = None
    reasoning_content: str | None = None
    refusal: Any = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def text(self) -> str:
        """The content, whose parts are joined by a space, as SGLang does. Only after `chat_prompt` has checked it."""
        if isinstance(self.content, list):
            return " ".join(part["text"] for part in self.content)
        return self.content or ""


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
    if message.role == "function":
        raise unsupported(f"{param}.role", f"A message with role '{message.role}'")
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid(
            f"Invalid value for '{param}.role': '{message.role}' is none of {', '.join(_ROLES)}.",
            f"{param}.role",
            "invalid_value",
        )
    for field in ("audio", "function_call", "refusal"):
        if getattr(message, field) not in (None, [], ""):
            raise unsupported(f"{param}.{field}", f"'{field}' in a message")
    if message.annotations not in (None, []):
        raise unsupported(f"{param}.annotations", "'annotations' in a message")
    for field, owner in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, field) and role != owner:
            raise invalid(
                f"Invalid value for '{param}.{field}': only a message with role '{owner}' has it.",
                f"{param}.{field}",
                "invalid_value",
            )
    if message.content is None and not (message.tool_calls or message.reasoning_content):
        raise invalid(
            f"Invalid value for '{param}.content': it must be a string or a list of text parts.",
            f"{param}.content",
            "invalid_value",
        )
    if isinstance(message.content, list):
        for i, part in enumerate(message.content):
            _check_part(part, f"{param}.content[{i}]")
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call, arguments_as_text) for call in message.tool_calls]
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


def _check_part(part: dict[str, Any], param: str) -> None:
    """Raises ApiError for a part of a message that is not text."""
    kind = part.get("type")
    if kind != "text":
        if isinstance(kind, str):
            raise unsupported(f"{param}.type", f"A content part of type '{kind}'")
        raise invalid(f"Invalid value for '{param}': a content part has a 'type'.", param, "invalid_value")
    for key in part:
        if key not in ("type", "text"):
            raise invalid(
                f"Unrecognized request argument supplied: {param}.{key}", f"{param}.{key}", "unknown_parameter"
            )
    if not isinstance(part.get("text"), str):
        raise invalid(f"Invalid value for '{param}.text': expected a string.", f"{param}.text", "invalid_value")
