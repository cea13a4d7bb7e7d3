"""Tools of a request: what may be called, what must be, and how calls are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct, structs

from llm_runtime.actors.ingress.constraints import either, schema_constraint
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.parsers.tool_calls.base import Tools

ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}\Z")]

MAX_TOOLS = 1024
_MAX_DEPTH = 256
"""Of lists and objects in a tool's parameters."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples")
"""Keywords of JSON Schema whose values have names of the client's, and those whose values are no schemas."""


class Function(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A function that may be called. `parameters` is a JSON Schema that the model sees and may keep to."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"type": ("function",)}

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tool; all are functions. `cache_control` is what Anthropic's clients add, without effect."""

    unsupported: ClassVar[tuple[str, ...]] = ("custom",)

    type: Literal["function"]
    function: Function
    cache_control: Any = None

    @staticmethod
    def reshaped(value: dict[str, Any]) -> dict[str, Any]:
        """A tool without its type, or in the flat shape that /v1/responses has."""
        tool = {**value, "type": value.get("type") or "function"}
        if tool["type"] != "function":
            return tool
        if "function" not in tool and "name" in tool:
            tool["function"] = {}
        if isinstance(tool.get("function"), dict):
            inner = {name: tool.pop(name) for name in Function.__struct_fields__ if name in tool}
            tool["function"] = {**inner, **tool["function"]}
        return tool


class FunctionName(Struct, forbid_unknown_fields=True):
    """Which function is to be called."""

    name: str


class NamedTool(Struct, tag="function", forbid_unknown_fields=True):
    """A `tool_choice` that asks for a call of one function."""

    function: FunctionName

    @staticmethod
    def reshaped(value: dict[str, Any]) -> Any:
        """A choice in the shape that other protocols have: a type alone, or the name beside the type."""
        kind = value.get("type")
        if isinstance(kind, str) and kind in _CHOICES and not value.get("name"):
            return _CHOICES[kind]
        if kind == "function" and "name" in value and "function" not in value:
            return {"type": kind, "function": {"name": value["name"]}}
        return value


class AllowedTool(Struct, forbid_unknown_fields=True):
    """One of those that may be called."""

    function: FunctionName
    type: Literal["function"] = "function"

    @staticmethod
    def reshaped(value: dict[str, Any]) -> dict[str, Any]:
        """The name beside the type, as /v1/responses has it."""
        return {"function": {"name": value["name"]}} if value.keys() <= {"type", "name"} and "name" in value else value


class AllowedTools(Struct, forbid_unknown_fields=True):
    """What `tool_choice` leaves of the tools."""

    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class AllowedChoice(Struct, tag="allowed_tools", forbid_unknown_fields=True):
    """A `tool_choice` that leaves some of the tools."""

    allowed_tools: AllowedTools


_CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}

ToolChoice = Literal["auto", "none", "required"] | NamedTool | AllowedChoice


def named_tool(name: str) -> NamedTool:
    """A `tool_choice` that asks for a call of this function."""
    return NamedTool(FunctionName(name))


def callable_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """The tools that the model is shown. Raises ApiError where these and `tool_choice` contradict each other."""
    tools = tools or ()
    if len(tools) > MAX_TOOLS:
        raise invalid(f"Invalid value for 'tools': at most {MAX_TOOLS} tools are allowed.", "tools", "invalid_value")
    names = [tool.function.name for tool in tools]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise invalid(f"Invalid value for 'tools': two of them are named '{twice}'.", "tools", "invalid_value")
    if isinstance(choice, AllowedChoice):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        tools = [tool for tool in tools if tool.function.name in allowed]
    if is_forced(choice) and not tools:
        raise invalid("tool_choice is only allowed when tools are given.", "tool_choice")
    if isinstance(choice, NamedTool):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise invalid(
                f"Invalid value for 'tool_choice': there is no tool named '{choice.function.name}' in 'tools'.",
                "tool_choice",
                "invalid_value",
            )
        return chosen
    return [] if choice == "none" else list(tools)


def rendered(tools: Sequence[Tool]) -> str:
    """The tools for the chat template, empty if there are none."""
    return msgspec.json.encode([Tool(tool.type, tool.function) for tool in tools]).decode() if tools else ""


def parameters_of(tools: Sequence[Tool]) -> Tools:
    """What parsers need to know of tools."""
    return {tool.function.name: tool.function.parameters for tool in tools}


def is_forced(choice: ToolChoice | None) -> bool:
    """Whether `tool_choice` leaves the model no choice but to call a tool."""
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode == "required"
    return choice is not None and choice not in ("auto", "none")


def calls_schema(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> dict[str, Any]:
    """JSON Schema of a whole output of calls: a list, which `JSONListCalls` reads.

    It is the same for all models, as SGLang's and vLLM's is. A tool's parameters that refer to places in themselves
    become a definition, and their references are made relative to it.
    """
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for place, tool in enumerate(tools):
        parameters: Any = tool.function.parameters or {"type": "object", "properties": {}}
        moved = _moved(parameters, f"#/$defs/tool{place}")
        if moved != parameters:
            definitions[f"tool{place}"] = moved
            parameters = {"$ref": f"#/$defs/tool{place}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if isinstance(choice, NamedTool) or not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def _moved(schema: Any, place: str, by_name: bool = False, depth: int = 0) -> Any:
    """A schema that stands at a place of another one, with the references to itself made anew.

    Args:
        by_name: it is an object whose fields are schemas.
    """
    if depth > _MAX_DEPTH:
        raise invalid("Invalid value for 'tools': the parameters are nested too deep.", "tools", "invalid_value")
    if isinstance(schema, list):
        return [_moved(each, place, False, depth + 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for name, each in schema.items():
        if not by_name and name == "$ref" and isinstance(each, str) and (each == "#" or each.startswith("#/")):
            moved[name] = place + each[1:]
        elif not by_name and name in _VALUES:
            moved[name] = each
        else:
            moved[name] = _moved(each, place, not by_name and name in _BY_NAME, depth + 1)
    return moved


def constrained(
    sampling: SamplingParams, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool
) -> SamplingParams:
    """Sampling that keeps to what the tools ask for. A forced call is constrained in place of the text; where a call is
    possible, the output is a call or what the text is constrained to. Raises ApiError."""
    if is_forced(choice):
        schema = calls_schema(tools, choice, parallel)
        return structs.replace(sampling, constraint=schema_constraint(schema, "tools"))
    if tools and sampling.constraint is not None:
        schema = calls_schema(tools, choice, parallel)
        return structs.replace(sampling, constraint=either(sampling.constraint, schema, "tools"))
    strict = [tool for tool in tools if tool.function.strict]
    if strict:
        schema = calls_schema(strict, choice, parallel)
        return structs.replace(sampling, checked=schema_constraint(schema, "tools"))
    return sampling


def call_id(rid: str, choice: int, index: int, short: bool = False) -> str:
    """The identity of a call, drawn from that of the request, so that it is the same whenever the answer is made anew.

    Args:
        short: as Mistral's chat templates want it.
    """
    digest = hashlib.blake2b(f"{rid}/{choice}/{index}".encode(), digest_size=12).hexdigest()
    return digest[:9] if short else f"call_{digest}"
