"""Requests for responses as chat requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from llm_runtime.actors.ingress.decoding import asks_for_nothing, converted
from llm_runtime.actors.ingress.errors import ApiError, invalid, unsupported
from llm_runtime.actors.ingress.openai.messages import CalledFunction, ChatMessage, ToolCall
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.responses.protocol import (
    AllowedTools,
    CustomCall,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    ItemReference,
    Message,
    NamedFunction,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
    ShellCall,
    ShellCallOutput,
    Text,
)
from llm_runtime.actors.ingress.openai.responses.store import ResponseStore
from llm_runtime.actors.ingress.openai.tools import Function, Tool, ToolChoice, named_tool

_LOGPROBS = "message.output_text.logprobs"
"""The one thing in `include` that is not built. The others belong to tools that this server does not run, or are given
without being asked for."""

_TEXTS = ("input_text", "output_text", "text", "summary_text")
"""Types of content parts whose text is in `text`."""

Warn = Callable[[str], None]


def items_of(request: ResponsesRequest, store: ResponseStore, reader: str) -> list[dict[str, Any]]:
    """The conversation that a request goes on with: of the response before, if it names one, and its own input. Raises
    ApiError.

    Args:
        reader: see `ResponseStore.load`.
    """
    before: list[dict[str, Any]] = []
    if request.previous_response_id:
        stored = store.load(request.previous_response_id, reader)
        if stored is None:
            raise _not_stored("response", request.previous_response_id, "previous_response_id")
        before = stored.conversation
    elif request.input == []:
        raise invalid("Invalid value for 'input': there is nothing to answer.", "input", "invalid_value")
    if isinstance(request.input, str):
        text = {"type": "input_text", "text": request.input}
        return [*before, {"type": "message", "role": "user", "content": [text]}]
    return [*before, *(_found(item, f"input[{i}]", store, reader) for i, item in enumerate(request.input))]


def _found(item: dict[str, Any], param: str, store: ResponseStore, reader: str) -> dict[str, Any]:
    """An item, in place of a reference to it. OpenAI's clients may leave the type of a reference out."""
    if item.get("type") != "item_reference" and item.keys() != {"id"}:
        return item
    reference = converted(item, ItemReference, param)
    found = store.item(reference.id, reader)
    if found is None:
        raise _not_stored("item", reference.id, f"{param}.id")
    return found


def _not_stored(what: str, identity: str, param: str) -> ApiError:
    return ApiError(
        404,
        f"The {what} '{identity}' is not stored here (any more): send the whole conversation as 'input' instead.",
        param,
        "previous_response_not_found" if what == "response" else "item_not_found",
    )


def chat_request(request: ResponsesRequest, items: list[dict[str, Any]], warn: Warn) -> ChatRequest:
    """The same as a chat request. Raises ApiError for what is not supported.

    Args:
        items: the conversation.
        warn: told of what is left out.
    """
    if not asks_for_nothing(request.conversation):
        raise unsupported(
            "conversation", "'conversation' (send 'previous_response_id', or the whole conversation as 'input')"
        )
    if request.context_management:
        warn("context_management is skipped: this server writes no summaries")
    if _LOGPROBS in (request.include or ()):
        raise unsupported("include", f"'{_LOGPROBS}' in 'include'")
    messages = [ChatMessage("system", request.instructions)] if request.instructions else []
    for i, item in enumerate(items, len(request.input) - len(items) if isinstance(request.input, list) else 0):
        _add(messages, item, f"input[{i}]" if i >= 0 else "previous_response_id", warn)
    tools, choice = _tools(request, warn)
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        stop=request.stop,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        chat_template_kwargs=request.chat_template_kwargs,
        stream=request.stream,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        verbosity=None if request.text is None else request.text.verbosity,
        response_format=_format(request),
    )


def _add(messages: list[ChatMessage], item: dict[str, Any], param: str, warn: Warn) -> None:
    """Adds an item. What an assistant has reasoned, said and called in one turn is one message. What a tool has done
    that OpenAI runs is left out."""
    kind = item.get("type") or "message"
    if isinstance(kind, str) and kind in _OF_SERVERS:
        warn(f"{param}: an item of type '{kind}' is skipped: the model would not know it")
        return
    add = _ITEMS.get(kind) if isinstance(kind, str) else None
    if add is None:
        raise unsupported(f"{param}.type", f"An item of type '{kind}'")
    add(messages, {**item, "type": kind}, param)


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
    text = "".join(part.text for part in reasoning.content or ())
    if text:
        turn = _turn(messages)
        turn.reasoning_content = (turn.reasoning_content or "") + text


def _add_call(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    call = converted(item, FunctionCall, param)
    _call(messages, call.call_id, call.name, call.arguments or "")


def _add_custom_call(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    call = converted(item, CustomCall, param)
    _call(messages, call.call_id, call.name, {"input": call.input})


def _add_shell_call(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    call = converted(item, ShellCall, param)
    _call(messages, call.call_id, call.type.removesuffix("_call"), call.action)


def _add_shell_output(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    output = converted(item, ShellCallOutput, param)
    text = output.output if isinstance(output.output, str) else msgspec.json.encode(output.output).decode()
    messages.append(ChatMessage("tool", text, tool_call_id=output.call_id or output.id))


def _call(messages: list[ChatMessage], identity: str, name: str, arguments: str | dict[str, Any]) -> None:
    turn = _turn(messages)
    turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(CalledFunction(name, arguments), identity)]


def _add_output(messages: list[ChatMessage], item: dict[str, Any], param: str) -> None:
    output = converted(item, FunctionCallOutput, param)
    messages.append(ChatMessage("tool", _texts(output.output, f"{param}.output"), tool_call_id=output.call_id))


_ITEMS: dict[str, Callable[[list[ChatMessage], dict[str, Any], str], None]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "custom_tool_call": _add_custom_call,
    "custom_tool_call_output": _add_output,
    "local_shell_call": _add_shell_call,
    "local_shell_call_output": _add_shell_output,
    "shell_call": _add_shell_call,
    "shell_call_output": _add_shell_output,
}
_OF_SERVERS = frozenset(
    {
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
        *("mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
        *("tool_search_call", "tool_search_output"),
    }
)
"""Types of items that tell what OpenAI's own tools have done."""


def _turn(messages: list[ChatMessage]) -> ChatMessage:
    """The assistant's message that is being put together."""
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage("assistant", []))
    return messages[-1]


def _texts(content: str | list[dict[str, Any]] | None, param: str) -> list[dict[str, Any]]:
    """Parts as those of a chat message."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        return []
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        where, kind = f"{param}[{i}]", part.get("type")
        if kind == "refusal":
            parts.append({"type": "text", "text": converted(part, Refusal, where).refusal})
            continue
        if isinstance(kind, str) and kind not in _TEXTS:
            raise unsupported(f"{where}.type", f"A content part of type '{kind}'")
        parts.append({"type": "text", "text": converted(part, Text, where).text})
    return parts


def _tools(request: ResponsesRequest, warn: Warn) -> tuple[list[Tool], ToolChoice | None]:
    """The tools that may be called here, and which of them are to be. Those that OpenAI or the client's machine runs
    under a type of their own are left out, unless a call of one is forced."""
    tools: list[Tool] = []
    for i, tool in enumerate(request.tools or ()):
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "function":
            warn(f"tools[{i}] is left out: this server runs no tools of type '{kind}'")
            continue
        function = converted(tool, FunctionTool, f"tools[{i}]")
        own = Function(function.name, function.description, function.parameters, function.strict)
        tools.append(Tool("function", own))
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = converted(choice, AllowedTools, "tool_choice")
        names = [tool.get("name") for tool in allowed.tools]
        tools = [tool for tool in tools if tool.function.name in names]
        choice = allowed.mode
    if isinstance(choice, dict):
        kind = choice.get("type")
        if not choice or kind in ("auto", "none", "required"):
            return tools, kind
        if isinstance(kind, str) and kind != "function":
            raise unsupported("tool_choice", f"A call of a tool of type '{kind}'")
        return tools, named_tool(converted(choice, NamedFunction, "tool_choice").name)
    return tools, choice


def _format(request: ResponsesRequest) -> dict[str, Any] | None:
    """`text.format` as chat's `response_format`, which has the schema one level deeper."""
    form = None if request.text is None else request.text.format
    if form is None or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
