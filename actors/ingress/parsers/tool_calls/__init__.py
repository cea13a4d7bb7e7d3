"""Formats of tool calls, by the names that SGLang gives them."""

from __future__ import annotations

from typing import Literal, get_args

from actors.ingress.parsers.events import Parser
from actors.ingress.parsers.tool_calls.base import ToolCallParser, Tools
from actors.ingress.parsers.tool_calls.deepseek import DeepSeekV3Calls, DeepSeekV31Calls
from actors.ingress.parsers.tool_calls.dsml import DSMLCalls
from actors.ingress.parsers.tool_calls.glm import GLMCalls
from actors.ingress.parsers.tool_calls.hermes import HermesCalls
from actors.ingress.parsers.tool_calls.kimi import KimiCalls
from actors.ingress.parsers.tool_calls.llama import LlamaCalls
from actors.ingress.parsers.tool_calls.mistral import MistralCalls
from actors.ingress.parsers.tool_calls.pythonic import PythonicCalls
from actors.ingress.parsers.tool_calls.qwen_coder import QwenCoderCalls

ToolCallFormat = Literal[
    "deepseekv3",
    "deepseekv31",
    "deepseekv32",
    "glm45",
    "glm47",
    "hermes",
    "kimi_k2",
    "llama3",
    "mistral",
    "pythonic",
    "qwen25",
    "qwen3_coder",
]
TOOL_CALL_FORMATS: tuple[ToolCallFormat, ...] = get_args(ToolCallFormat)

_FORMATS: dict[ToolCallFormat, type[ToolCallParser]] = {
    "deepseekv3": DeepSeekV3Calls,
    "deepseekv31": DeepSeekV31Calls,
    "deepseekv32": DSMLCalls,
    "glm45": GLMCalls,
    "glm47": GLMCalls,
    "hermes": HermesCalls,
    "kimi_k2": KimiCalls,
    "llama3": LlamaCalls,
    "mistral": MistralCalls,
    "pythonic": PythonicCalls,
    "qwen25": HermesCalls,
    "qwen3_coder": QwenCoderCalls,
}


def tool_call_parser(name: ToolCallFormat, tools: Tools) -> Parser:
    """A parser for one output of a model that may call tools."""
    return _FORMATS[name](tools)
