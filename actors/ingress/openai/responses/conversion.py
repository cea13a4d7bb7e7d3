"""Requests for responses as chat requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from actors.ingress.decoding import converted
from actors.ingress.errors import invalid, unsupported
from actors.ingress.openai.messages import CalledFunction, ChatMessage, ToolCall
from actors.ingress.openai.requests import ChatRequest
from actors.ingress.openai.responses.protocol import (
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Message,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
    Text,
)
from actors.ingress.openai.tools import Function, Tool, named_tool

T = TypeVar("T")

_UNSUPPORTED = ("context_management", "max_tool_calls", "moderation", "prompt", "top_logprobs")
_MEMORY = "This server keeps nothing of an answer: send the whole conversation as 'input'"


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError for what is not supported."""
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise invalid(f"{_MEMORY}, without '{name}'.", name, "unsupported_parameter")
    if request.store:
        raise invalid(f"{_MEMORY}, with store = false.", "store", "unsupported_parameter")
    if request.background:
        raise unsupported("background", "An answer in the background")
    if request.truncation == "auto":
        raise unsupported("truncation", "truncation = 'auto'")
    for name in _UNSUPPORTED:
        if getattr(request, name) not in (None, 0, [], {}):
            raise unsupported(name)
    for name in request.include or ():
        if name != "reasoning.encrypted_content":  # reasoning is given in plain text, which can be sent back as well
            raise unsupported("include", f"'{name}' in 'include'")
    messages = [ChatMessage("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        messages.append(ChatMessage("user", request.input))
    else:
        for i, item in enumerate(request.input):
            _add(messages, item, f"input[{i}]")
    choice = request.tool_choice
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())] or None,
        tool_choice=named_tool(choice.name) if isinstance(choice, NamedFunction) else choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        response_format=_format(request),
    )


def _add(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    """Adds an item. What an assistant has reasoned, said and called in one turn is one message."""
    kind = item.get("type", "message")
    add = _ITEMS.get(kind) if isinstance(kind, str) else None
    if add is None:
        raise unsupported(f"{param}.type", f"An item of type '{kind}'")
    # Clients send an answer's items back with fields that the server has not set.
    add(messages, {key: value for key, value in item.items() if value is not None}, param)


def _add_message(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    message = converted(item, Message, param)
    parts = _texts(message.content, f"{param}.content")
    if message.role != "assistant":
        messages.append(ChatMessage(message.role, parts))
        return
    content = _turn(messages).content
    assert isinstance(content, list)
    content += parts


def _add_reasoning(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    reasoning = converted(item, ReasoningItem, param)
    turn = _turn(messages)
    turn.reasoning_content = (turn.reasoning_content or "") + "".join(part.text for part in reasoning.content or ())


def _add_call(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    call = converted(item, FunctionCall, param)
    turn = _turn(messages)
    turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(CalledFunction(call.name, call.arguments), call.call_id)]


def _add_output(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    output = converted(item, FunctionCallOutput, param)
    messages.append(ChatMessage("tool", _texts(output.output, f"{param}.output"), tool_call_id=output.call_id))


_ITEMS: dict[str, Callable[[list[ChatMessage], dict[str, Any], str], None]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "function_call": _add_call,
    "function_call_output": _add_output,
}


def _turn(messages: list[ChatMessage]) -> ChatMessage:
    """The assistant's message that is being put together."""
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage("assistant", []))
    return messages[-1]


def _texts(content: str | list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """Parts as those of a chat message."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        where, kind = f"{param}[{i}]", part.get("type")
        if isinstance(kind, str) and kind not in ("input_text", "output_text"):
            raise unsupported(f"{where}.type", f"A content part of type '{kind}'")
        parts.append({"type": "text", "text": converted(part, Text, where).text})
    return parts


def _tool(tool: dict[str, Any], param: str) -> Tool:
    if isinstance(tool.get("type"), str) and tool["type"] != "function":
        raise unsupported(f"{param}.type", f"A tool of type '{tool['type']}'")
    function = converted(tool, FunctionTool, param)
    return Tool("function", Function(function.name, function.description, function.parameters, function.strict))


def _format(request: ResponsesRequest) -> dict[str, Any] | None:
    """`text.format` as chat's `response_format`, which has the schema one level deeper."""
    form = None if request.text is None else request.text.format
    if form is None or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
