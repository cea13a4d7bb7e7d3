"""Kimi K2."""

from __future__ import annotations

import json
import re
from typing import Any

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS
from llm_runtime.actors.parsers.tool_calls.sections import SectionCalls
from llm_runtime.actors.parsers.tool_calls.values import parameter_kind, required_parameters, type_of

_NAMED = re.compile(r"(?:functions?[._:])?(?P<name>.+?)(?:[:._-][0-9]+)?")
_OWN_NAME = re.compile(r"(?:functions\.)?(?P<name>.+):[0-9]+")
"""What the model is trained to write: it names a tool, even if there is none of that name."""
_ARGUMENTS = "<|tool_call_argument_begin|>"


@FORMATS.register("kimi_k2", template=lambda template: "<|tool_calls_section_begin|>" in template)
class KimiCalls(SectionCalls):
    """`<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}<|tool_call_end|>` in a section. What the model
    writes before the arguments is the call's identity, which its template shows to it again. An identity that names no
    tool stands for the only one that there is, or else for the only one that the arguments fit; where several do, the
    call is dropped."""

    SECTIONS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
    SECTION_ENDS = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
    CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"

    def read_call(self) -> Steps[bool]:
        found = yield from self.until(_ARGUMENTS, *self.STOPS)
        if found is None or found[1] != _ARGUMENTS:
            return False
        identity = found[0].strip()
        name = self._name(identity)
        if name:
            return (yield from self.object_arguments(name, identity))
        yield from self.space()
        arguments = (yield from self.json(self.STOPS)) if (yield from self.peek()) == "{" else None
        if arguments is None or _OWN_NAME.fullmatch(identity):
            return False
        fitting = [name for name, schema in self._tools.items() if _fits(json.loads(arguments), schema)]
        if len(fitting) == 1:
            self.start(fitting[0], identity)
            self.arguments(arguments)
        self.drop()
        return True

    def _name(self, identity: str) -> str:
        """The tool that an identity names, or the only one; empty if the arguments must tell."""
        if identity in self._tools:
            return identity
        match = _OWN_NAME.fullmatch(identity)
        if match is not None:
            return match["name"] if match["name"] in self._tools else ""
        match = _NAMED.fullmatch(identity)
        if match is not None and match["name"] in self._tools:
            return match["name"]
        return next(iter(self._tools)) if len(self._tools) == 1 else ""


def _fits(arguments: dict[str, Any], schema: Any) -> bool:
    """Whether a tool takes these arguments."""
    if any(key not in arguments for key in required_parameters(schema)):
        return False
    for key, value in arguments.items():
        kind, _ = parameter_kind(schema, key)
        types = {"integer", "number"} if type_of(value) == "integer" else {type_of(value)}
        if kind.unknown or not types & kind.types:
            return False
    return True
