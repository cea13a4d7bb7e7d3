"""The tools of an Anthropic request that the model is offered.

Which those are is a function of the request alone: a tool may be held back until a search has named it
(`defer_loading`), and system messages may add and remove tools. Tools that Anthropic's servers run are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from llm_runtime.actors.ingress.anthropic.client_tools import definition_of
from llm_runtime.actors.ingress.anthropic.protocol import (
    Choice,
    CountRequest,
    ToolAddition,
    ToolDefinition,
    ToolReference,
    ToolRemoval,
    ToolResult,
    ToolSearchToolResult,
)
from llm_runtime.actors.ingress.decoding import converted
from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.ingress.openai.tools import Function, Tool, ToolChoice, named_tool

_CUSTOM = (None, "custom")
_SEARCHES = "tool_search_tool_"


class _Offer:
    """Tools by name, in the order of the request; those that are `offered` are shown to the model."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.tools: list[Tool] = []
        self.offered: set[str] = set()
        self.deferred: set[str] = set()
        self.skipped: set[str] = set()
        self.searches = False
        self._warn = warn

    def add(self, raw: dict[str, Any], param: str, at_once: bool = False) -> None:
        """Takes a definition in, in place of an earlier one that is added again. `at_once`: it is not held back."""
        kind = raw.get("type")
        known = definition_of(raw) if isinstance(kind, str) else None
        if kind in _CUSTOM:
            tool = _tool(converted(raw, ToolDefinition, param))
        elif known is not None:
            tool = known
        else:
            self._warn(f"{param}: a tool of type '{kind}' is skipped: this server does not run it.")
            self.skipped.add(str(raw.get("name", kind)))
            self.searches = self.searches or str(kind).startswith(_SEARCHES)
            return
        name = tool.function.name
        callers = raw.get("allowed_callers")
        if isinstance(callers, list) and callers and "direct" not in callers:
            self._warn(f"{param}: '{name}' is skipped: only code that this server does not run may call it.")
            self.skipped.add(name)
            return
        if at_once:
            self.tools = [each for each in self.tools if each.function.name != name]
        self.tools.append(tool)
        if raw.get("defer_loading") is True and not at_once:
            self.deferred.add(name)
        else:
            self.offered.add(name)


def offered_tools(request: CountRequest, warn: Callable[[str], None]) -> tuple[list[Tool], ToolChoice | None]:
    """The tools that the model is shown, and whether it must call one. Raises ApiError.

    Args:
        warn: told what is skipped.
    """
    offer = _Offer(warn)
    for i, raw in enumerate(request.tools or ()):
        offer.add(raw, f"tools[{i}]")
    for name in _named(request):
        if name in offer.deferred:
            offer.offered.add(name)
    _change(offer, request)
    if offer.searches:  # nobody here searches for the tools that are held back
        offer.offered |= offer.deferred
    choice = request.tool_choice
    if choice is not None and choice.type == "tool" and choice.name in offer.deferred:
        offer.offered.add(choice.name)
    tools = [tool for tool in offer.tools if tool.function.name in offer.offered]
    return tools, _choice(choice, tools, offer.skipped)


def _named(request: CountRequest) -> Iterator[str]:
    """The tools that searches have found."""
    for message in request.messages:
        for block in message.content if isinstance(message.content, list) else ():
            match block:
                case ToolResult(content=list(parts)):
                    yield from (part.tool_name for part in parts if isinstance(part, ToolReference))
                case ToolSearchToolResult({"tool_references": list(found)}):
                    yield from (str(each.get("tool_name")) for each in found if isinstance(each, dict))


def _change(offer: _Offer, request: CountRequest) -> None:
    """What system messages add and remove."""
    for i, message in enumerate(request.messages):
        for j, block in enumerate(message.content if isinstance(message.content, list) else ()):
            param = f"messages[{i}].content[{j}].tool"
            match block:
                case ToolAddition({"type": "tool_definition", "definition": dict(raw)}):
                    offer.add(raw, f"{param}.definition", at_once=True)
                case ToolAddition({"type": "tool_reference", "name": str(name)}):
                    offer.offered.add(name)
                case ToolRemoval({"type": "tool_reference", "name": str(name)}):
                    offer.offered.discard(name)
                    offer.deferred.discard(name)
                case ToolAddition({"type": kind}) | ToolRemoval({"type": kind}):
                    raise unsupported(f"{param}.type", f"A change of tools of type '{kind}'")
                case ToolAddition() | ToolRemoval():
                    raise invalid(f"Invalid value for '{param}': it must be a tool_reference.", param, "invalid_value")


def _tool(tool: ToolDefinition) -> Tool:
    description = tool.description
    if tool.input_examples:
        examples = "\n".join(msgspec.json.encode(each).decode() for each in tool.input_examples)
        description = f"{description or ''}\n\nExamples of the input:\n{examples}".strip()
    return Tool("function", Function(tool.name, description, tool.input_schema, tool.strict))


def _choice(choice: Choice | None, tools: list[Tool], skipped: set[str]) -> ToolChoice | None:
    match choice:
        case None:
            return None
        case Choice("auto"):
            return "auto" if tools else None
        case Choice("none"):
            return "none"
        case Choice("any"):
            if not tools and skipped:
                raise unsupported("tool_choice", "A call that must be one of a tool that Anthropic runs")
            return "required"
    if choice.name is None:
        raise invalid("A tool_choice of type 'tool' needs the tool's name.", "tool_choice.name")
    if choice.name in skipped:
        raise unsupported("tool_choice", f"A call of the tool '{choice.name}', which Anthropic runs,")
    return named_tool(choice.name)
