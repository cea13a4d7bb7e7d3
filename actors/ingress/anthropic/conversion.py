"""Anthropic's requests as chat requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.ingress.anthropic.protocol import (
    Choice,
    CountRequest,
    Message,
    MessagesRequest,
    Refused,
    Text,
    Thinking,
    ToolDefinition,
    ToolResult,
    ToolUse,
)
from actors.ingress.errors import invalid, unsupported
from actors.ingress.openai.messages import CalledFunction, ChatMessage, ToolCall
from actors.ingress.openai.requests import ChatRequest
from actors.ingress.openai.tools import Function, Tool, ToolChoice, named_tool


def chat_request(request: CountRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError for what is not supported."""
    for name in ("context_management", "mcp_servers", "container"):
        if getattr(request, name, None) not in (None, [], {}):
            raise unsupported(name)
    messages: list[ChatMessage] = []
    if request.system:
        messages.append(ChatMessage("system", _texts(request.system, "system")))
    for i, message in enumerate(request.messages):
        _add(messages, message, f"messages[{i}]")
    last = messages[-1]
    if last.role == "assistant" and last.tool_calls:
        raise invalid("A tool_use block must be followed by a message with its tool_result.", "messages")
    thinking, output, choice = request.thinking, request.output_config, request.tool_choice
    # Templates have two names for this; those that cannot do otherwise know neither.
    switch = None if thinking is None or thinking.type == "adaptive" else thinking.type == "enabled"
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        continue_final_message=last.role == "assistant",
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())] or None,
        tool_choice=_choice(choice),
        parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        chat_template_kwargs=None if switch is None else {"enable_thinking": switch, "thinking": switch},
        reasoning_effort=None if output is None else output.effort,
    )
    if output is not None and output.format is not None:
        chat.response_format = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": output.format.schema},
        }
    if isinstance(request, MessagesRequest):
        chat.max_tokens = request.max_tokens
        chat.stop = request.stop_sequences
        chat.stream = request.stream
        chat.temperature, chat.top_k, chat.top_p = request.temperature, request.top_k, request.top_p
        if thinking is not None and thinking.type != "disabled":
            chat.thinking_budget = thinking.budget_tokens
    return chat


def _add(messages: list[ChatMessage], message: Message, param: str) -> None:
    """Adds a turn: results of calls become messages of their own, and a turn of the same role as the one before goes
    on with it."""
    blocks = [Text(message.content)] if isinstance(message.content, str) else message.content
    for i, block in enumerate(blocks):
        where = f"{param}.content[{i}]"
        match block:
            case Text():
                content = _of(messages, message.role).content
                assert isinstance(content, list)
                content += _texts([block], where)
            case ToolResult() if message.role == "user":
                text = _texts(block.content, f"{where}.content")
                if block.is_error:
                    text.insert(0, {"type": "text", "text": "Error:"})
                messages.append(ChatMessage("tool", text, tool_call_id=block.tool_use_id))
            case Thinking() if message.role == "assistant":
                turn = _of(messages, "assistant")
                turn.reasoning_content = (turn.reasoning_content or "") + block.thinking
            case ToolUse() if message.role == "assistant":
                turn = _of(messages, "assistant")
                call = ToolCall(CalledFunction(block.name, block.input), block.id)
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case _ if isinstance(block, Refused):
                raise _refusal(block, where)
            case _:
                kind = _kind(block)
                raise invalid(
                    f"A block of type '{kind}' is not allowed in a message with role '{message.role}'.",
                    f"{where}.type",
                    "invalid_value",
                )
    if not blocks:
        _of(messages, message.role)


def _of(messages: list[ChatMessage], role: str) -> ChatMessage:
    """The message that a turn of this role goes on with."""
    if not messages or messages[-1].role != role:
        messages.append(ChatMessage(role, []))
    return messages[-1]


def _texts(content: str | Sequence[Any], param: str) -> list[dict[str, Any]]:
    """Text blocks as parts of a chat message."""
    parts: list[dict[str, Any]] = []
    for i, block in enumerate([Text(content)] if isinstance(content, str) else content):
        if not isinstance(block, Text):
            raise _refusal(block, f"{param}[{i}]")
        parts.append({"type": "text", "text": block.text})
    return parts


def _refusal(block: Any, param: str) -> Exception:
    return unsupported(f"{param}.type", f"A block of type '{_kind(block)}'")


def _kind(block: Any) -> str:
    return str(block.__struct_config__.tag)


def _tool(tool: ToolDefinition, param: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise unsupported(f"{param}.type", f"A tool of type '{tool.type}'")
    if tool.defer_loading:
        raise unsupported(f"{param}.defer_loading")
    if tool.allowed_callers not in (None, ["direct"]):
        raise unsupported(f"{param}.allowed_callers", "A caller of tools other than 'direct'")
    if tool.input_examples not in (None, []):
        raise unsupported(f"{param}.input_examples")
    if tool.input_schema is None:
        raise invalid(f"Invalid value for '{param}': a tool needs an input_schema.", f"{param}.input_schema")
    return Tool("function", Function(tool.name, tool.description, tool.input_schema, tool.strict))


def _choice(choice: Choice | None) -> ToolChoice | None:
    match choice:
        case None:
            return None
        case Choice("auto"):
            return "auto"
        case Choice("none"):
            return "none"
        case Choice("any"):
            return "required"
    if choice.name is None:
        raise invalid("A tool_choice of type 'tool' needs the tool's name.", "tool_choice.name")
    return named_tool(choice.name)
