"""Anthropic's requests as chat requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llm_runtime.actors.ingress.anthropic.protocol import (
    Compaction,
    CountRequest,
    Document,
    Image,
    Message,
    MessagesRequest,
    OfServers,
    RedactedThinking,
    SearchResult,
    Text,
    Thinking,
    ToolAddition,
    ToolReference,
    ToolRemoval,
    ToolResult,
    ToolUse,
)
from llm_runtime.actors.ingress.anthropic.tools import offered_tools
from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.ingress.openai.messages import CalledFunction, ChatMessage, ToolCall
from llm_runtime.actors.ingress.openai.requests import ChatRequest

Warn = Callable[[str], None]

_BILLING = "x-anthropic-billing-header"
"""Claude Code begins its system prompt with a line of this name, which differs in each request: it is nothing for the
model, and would keep it from finding anything in the prefix cache."""


def chat_request(request: CountRequest, warn: Warn) -> ChatRequest:
    """The same as a chat request. Raises ApiError for what is not supported.

    Args:
        warn: told what is left out of account.
    """
    if request.mcp_servers:
        warn("mcp_servers is skipped: this server calls no MCP servers.")
    if request.speed == "fast":
        warn("speed is skipped: there is one speed.")
    messages: list[ChatMessage] = []
    if request.system:
        blocks = [Text(request.system)] if isinstance(request.system, str) else request.system
        texts = _texts([each for each in blocks if not each.text.startswith(_BILLING)], "system", warn)
        if texts:
            messages.append(ChatMessage("system", texts))
    for param, message in _in_order(request.messages):
        _add(messages, message, param, warn)
    if not messages:
        raise invalid("Invalid value for 'messages': they say nothing.", "messages", "invalid_value")
    last = messages[-1]
    if last.role == "assistant" and last.tool_calls:
        raise invalid("A tool_use block must be followed by a message with its tool_result.", "messages")
    thinking, output, choice = request.thinking, request.output_config, request.tool_choice
    # Templates have two names for this; those that cannot do otherwise know neither.
    switch = thinking.type == "enabled" if thinking is not None and thinking.type in ("enabled", "disabled") else None
    tools, tool_choice = offered_tools(request, warn)
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        continue_final_message=last.role == "assistant",
        tools=tools or None,
        tool_choice=tool_choice,
        parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        chat_template_kwargs=None if switch is None else {"enable_thinking": switch, "thinking": switch},
        reasoning_effort=_effort(request),
    )
    form = request.output_format if output is None or output.format is None else output.format
    if form is not None:
        chat.response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema}}
    if output is not None and output.task_budget is not None:
        warn("output_config.task_budget is skipped: the model is not told of budgets.")
    if isinstance(request, MessagesRequest):
        chat.max_tokens = request.max_tokens
        chat.stop = request.stop_sequences
        chat.stream = request.stream
        chat.temperature, chat.top_k, chat.top_p = request.temperature, request.top_k, request.top_p
        if thinking is not None and thinking.type != "disabled":
            chat.thinking_budget = thinking.budget_tokens
    return chat


def _effort(request: CountRequest) -> Any:
    """How much to reason: what the last system message says where no answer has followed it, else the request."""
    for message in reversed(request.messages):
        if message.role == "assistant":
            break
        if message.output_config is not None and message.output_config.effort is not None:
            return message.output_config.effort
    return None if request.output_config is None else request.output_config.effort


def _in_order(messages: Sequence[Message]) -> list[tuple[str, Message]]:
    """The turns with their places in the request. A system message between a call and its result comes behind the
    result, and one that the next message of the user has cleared is left out."""
    ordered: list[tuple[str, Message]] = []
    held: list[tuple[str, Message]] = []
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    awaited = False
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        if message.role == "system":
            if message.clear_at != "next_user_message" or i > last_user:
                (held if awaited else ordered).append((param, message))
            continue
        if message.clear_at is not None or message.output_config is not None:
            field = "clear_at" if message.clear_at is not None else "output_config"
            raise invalid(
                f"Invalid value for '{param}.{field}': only a message with role 'system' has it.",
                f"{param}.{field}",
                "invalid_value",
            )
        ordered.append((param, message))
        ordered += held
        held = []
        blocks = message.content if message.role == "assistant" else None
        awaited = any(isinstance(block, ToolUse) for block in blocks or ())
    return ordered + held


def _add(messages: list[ChatMessage], message: Message, param: str, warn: Warn) -> None:
    """Adds a turn: results of calls become messages of their own, and a turn of the same role as the one before goes
    on with it."""
    blocks = [Text(message.content)] if isinstance(message.content, str) else message.content or []
    for i, block in enumerate(blocks):
        where = f"{param}.content[{i}]"
        match block:
            case Text():
                if not (message.role == "system" and block.text.startswith(_BILLING)):
                    _say(messages, message.role, block.text)
            case ToolResult() if message.role == "user":
                parts = [Text(block.content)] if isinstance(block.content, str) else block.content or []
                text = _texts(parts, f"{where}.content", warn)
                if block.is_error:
                    text.insert(0, {"type": "text", "text": "Error:"})
                messages.append(ChatMessage("tool", text, tool_call_id=block.tool_use_id))
            case Document() | SearchResult() | Image() if message.role == "user":
                for part in _texts([block], where, warn, indexed=False):
                    _say(messages, "user", part["text"])
            case Thinking() if message.role == "assistant":
                turn = _of(messages, "assistant")
                turn.reasoning_content = (turn.reasoning_content or "") + block.thinking
            case ToolUse() if message.role == "assistant":
                turn = _of(messages, "assistant")
                call = ToolCall(CalledFunction(block.name, block.input), block.id)
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case Compaction():
                if block.content:
                    _say(messages, message.role, block.content)
            case RedactedThinking() if message.role == "assistant":
                _of(messages, "assistant")
            case ToolAddition() | ToolRemoval() if message.role == "system":
                pass  # see `tools`
            case _ if isinstance(block, OfServers):
                warn(f"{where}: a block of type '{_kind(block)}' is skipped: the model would not know it.")
                if message.role == "assistant":
                    _of(messages, "assistant")
            case _:
                raise invalid(
                    f"A block of type '{_kind(block)}' is not allowed in a message with role '{message.role}'.",
                    f"{where}.type",
                    "invalid_value",
                )
    if not blocks and message.role != "system":
        _of(messages, message.role)


def _say(messages: list[ChatMessage], role: str, text: str) -> None:
    content = _of(messages, role).content
    assert isinstance(content, list)
    content.append({"type": "text", "text": text})


def _of(messages: list[ChatMessage], role: str) -> ChatMessage:
    """The message that a turn of this role goes on with."""
    if not messages or messages[-1].role != role:
        messages.append(ChatMessage(role, []))
    return messages[-1]


def _texts(blocks: Sequence[Any], param: str, warn: Warn, indexed: bool = True) -> list[dict[str, Any]]:
    """Blocks as parts of a chat message. Raises ApiError for what is not text."""
    parts: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        where = f"{param}[{i}]" if indexed else param
        match block:
            case Text():
                text = block.text
            case ToolReference():
                text = f"The tool {block.tool_name} can be called now."
            case Document():
                text = _titled(block.title, block.context, _document(block, where))
            case SearchResult():
                text = _titled(block.title, block.source, "\n".join(each.text for each in block.content))
            case _:
                raise unsupported(f"{where}.type", f"A block of type '{_kind(block)}'")
        if isinstance(block, Document | SearchResult) and block.citations == {"enabled": True}:
            warn(f"{where}.citations is skipped: answers of this server cite nothing.")
        parts.append({"type": "text", "text": text})
    return parts


def _titled(title: str | None, source: str | None, text: str) -> str:
    return "\n".join(each for each in (title, source, text) if each)


def _document(block: Document, param: str) -> str:
    match block.source:
        case {"type": "text", "data": str(text)} | {"type": "content", "content": str(text)}:
            return text
        case {"type": "content", "content": list(parts)}:
            texts = [each.get("text") if isinstance(each, dict) else None for each in parts]
            if all(isinstance(each, str) for each in texts):
                return "\n".join(str(each) for each in texts)
    kind = block.source.get("type")
    raise unsupported(f"{param}.source", f"A document whose source is of type '{kind}'")


def _kind(block: Any) -> str:
    return str(block.__struct_config__.tag)
