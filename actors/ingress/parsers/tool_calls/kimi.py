"""Kimi K2."""

from __future__ import annotations

import re

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.sections import SectionCalls

_IDENTITY = re.compile(r"(?:functions\.)?(?P<name>.+):[0-9]+")


class KimiCalls(SectionCalls):
    """`<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}<|tool_call_end|>` in a section. What the model
    writes before the arguments is the call's identity, which its template shows to it again."""

    SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"

    def read_call(self) -> Steps[bool]:
        yield from self.space()
        identity = yield from self.word("_-.:")
        match = _IDENTITY.fullmatch(identity)
        yield from self.space()
        if match is None or match["name"] not in self._tools:
            return False
        if not (yield from self.accept("<|tool_call_argument_begin|>")):
            return False
        yield from self.space()
        if (yield from self.peek()) != "{":
            return False
        self.start(match["name"], identity)
        return (yield from self.give_json(self.arguments))
