"""DeepSeek V3.2."""

from __future__ import annotations

from actors.ingress.parsers.reader import Steps
from actors.ingress.parsers.tool_calls.base import ToolCallParser

_DSML = "｜DSML｜"


class DSMLCalls(ToolCallParser):
    """DeepSeek's markup language: `function_calls`, in it `invoke name="f"`, in it either an object in JSON or, for
    each parameter, `parameter name="k" string="true"` or "false". The names of the tags begin with `｜DSML｜`, which
    models leave out at times."""

    MARKERS = (f"<{_DSML}function_calls>", "<function_calls>", f"<{_DSML}invoke", "<invoke")

    def read_calls(self, marker: str) -> Steps[bool]:
        if marker.endswith(">"):
            yield from self.space()
            if not (yield from self._tag("<", "invoke")):
                return False
        while True:
            if not (yield from self._invoke()):
                return False
            yield from self.space()
            if (yield from self._tag("<", "invoke")):
                continue
            if (yield from self._tag("</", "function_calls>")):
                self.drop()
            return True

    def _tag(self, opening: str, rest: str) -> Steps[str]:
        """Reads a tag's beginning with or without the prefix; gives the prefix it has between its brackets."""
        for prefix in (_DSML, ""):
            if (yield from self.accept(opening + prefix + rest)):
                return opening + prefix
        return ""

    def _invoke(self) -> Steps[bool]:
        name = yield from self._attribute("name")
        yield from self.space()
        if name not in self._tools or not (yield from self.accept(">")):
            return False
        yield from self.space()
        if (yield from self.peek()) == "{":
            self.start(name)
            if not (yield from self.give_json(self.arguments)):
                return False
            yield from self.space()
            if (yield from self._tag("</", "invoke>")):
                self.drop()
            return True
        first = True
        while True:
            yield from self.space()
            if (yield from self._tag("</", "invoke>")):
                if first:
                    self.start(name)
                self.end_members(none=first)
                return True
            before = self.read
            tag = yield from self._tag("<", "parameter")
            key = (yield from self._attribute("name")) if tag else ""
            if not key:
                return False
            string = yield from self._attribute("string")
            yield from self.space()
            if not (yield from self.accept(">")):
                return False
            if first:
                self.start(name, markup=before)
            end = f"</{tag[1:]}parameter>"
            if not (
                (yield from self.string_parameter(key, first, end))
                if string == "true"
                else (yield from self.parameter(name, key, first, end))
            ):
                return False
            first = False

    def _attribute(self, name: str) -> Steps[str]:
        """Reads an attribute; empty if it is not there."""
        yield from self.space()
        if not (yield from self.accept(f'{name}="')):
            return ""
        value = yield from self.word("_-.$ ")
        return value if (yield from self.accept('"')) else ""
