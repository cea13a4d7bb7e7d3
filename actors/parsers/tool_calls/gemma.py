"""Gemma 3, FunctionGemma and Gemma 4."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from llm_runtime.actors.parsers.json_text import json_number, quoted
from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.parsers.tool_calls.pythonic import PythonCalls
from llm_runtime.actors.parsers.tool_calls.registry import FORMATS
from llm_runtime.actors.parsers.tool_calls.values import parameter_kind, value_json

_MAX_DEPTH = 64


@FORMATS.register("gemma3", template=lambda template: "tool_code" in template)
class Gemma3Calls(PythonCalls):
    """A block of Markdown of the kind `tool_code` with calls in Python, in a list or in lines, or a list alone."""

    MARKERS = ("```tool_code", "```python", "[")
    ENDS = ("```",)
    PLAIN = ("```python", "[")
    FRAMES = ("```tool_code", "```python")

    def python_call(self, drop: bool) -> Steps[bool]:
        printed = yield from self.accept("print(")
        if not (yield from super().python_call(drop)):
            return False
        if printed:
            yield from self.space()
            yield from self.accept(")")
        return True


class GemmaCalls(ToolCallParser):
    """A marker, `call:f{`, members such as `key:value` with commas between them, `}`, and what ends the call. Strings
    stand between two marks of their own; values are JSON otherwise, without quotes around keys. A call's members are
    given out one by one."""

    QUOTE: ClassVar[str]
    """The mark at both ends of a string."""
    TYPED: ClassVar[bool]
    """Whether all values are written as strings, so that the schema tells what they are."""

    def read_calls(self, marker: str) -> Steps[bool]:
        yield from self.space()
        if not (yield from self.accept("call:")):
            return False
        name = yield from self.tool_name()
        if not name or not (yield from self.accept("{")):
            return False
        self.start(name)
        members = 0
        while True:
            yield from self.space()
            if (yield from self.accept("}", *self.ENDS)):
                break
            if (yield from self.accept(",")):
                continue
            key = yield from self._key()
            value = None if key is None else (yield from self._value(0, name, key))
            if key is None or value is None:
                self.arguments("}" if members else "{}")
                self.drop()
                return not (yield from self.peek())
            self.arguments(f"{', ' if members else '{'}{quoted(key)}: {value}")
            members += 1
            self.drop()
        self.arguments("}" if members else "{}")
        self.drop()
        yield from self.end()
        return True

    def _key(self) -> Steps[str | None]:
        marked = yield from self.accept(self.QUOTE, '"')
        key = (yield from self.word("_-.$")) if not marked else ((yield from self.until(marked)) or ("", ""))[0]
        yield from self.space()
        return key.strip() if key and (yield from self.accept(":")) else None

    def _value(self, depth: int, name: str = "", key: str = "") -> Steps[str | None]:
        """Reads a value and gives its JSON; None if it is none or has no end. `name` and `key` are the tool's and the
        parameter's, where the value is one."""
        yield from self.space()
        if (yield from self.accept(self.QUOTE)):
            found = yield from self.until(self.QUOTE)
            if found is None:
                return None
            if self.TYPED and name:
                return value_json(found[0], parameter_kind(self._tools[name], key)[0])
            return quoted(found[0])
        opening = yield from self.accept("{", "[")
        if opening:
            return None if depth >= _MAX_DEPTH else (yield from self._container(opening, depth))
        if (yield from self.peek()) == '"':
            return (yield from self.json())
        found = yield from self.until(",", "}", "]", *self.ENDS)
        if found is None:
            return None
        self.rewind(self.read - len(found[1]))
        plain = found[0].strip()
        if self.TYPED and name:
            return value_json(plain, parameter_kind(self._tools[name], key)[0])
        words: dict[str, str] = {"true": "true", "false": "false", "null": "null", "none": "null", "nil": "null"}
        return words.get(plain.lower()) or json_number(plain) or quoted(plain)

    def _container(self, opening: str, depth: int) -> Steps[str | None]:
        closing = "}" if opening == "{" else "]"
        members: dict[str, Any] = {}
        items: list[Any] = []
        while True:
            yield from self.space()
            if (yield from self.accept(closing)):
                value: Any = members if opening == "{" else items
                return json.dumps(value, ensure_ascii=False)
            if (yield from self.accept(",")):
                continue
            key = (yield from self._key()) if opening == "{" else ""
            before = self.read
            text = None if key is None else (yield from self._value(depth + 1))
            if text is None or key is None or (self.read == before and opening == "["):
                return None
            members[key] = json.loads(text)
            items.append(members[key])


@FORMATS.register("gemma4", template=lambda template: "<|tool_call>" in template)
class Gemma4Calls(GemmaCalls):
    """`<|tool_call>call:f{k:<|"|>v<|"|>,n:42}<tool_call|>`."""

    MARKERS = ("<|tool_call>",)
    ENDS = ("<tool_call|>", "<|tool_response>")
    QUOTE = '<|"|>'
    TYPED = False


@FORMATS.register("functiongemma", template=lambda template: "<start_function_call>" in template)
class FunctionGemmaCalls(GemmaCalls):
    """`<start_function_call>call:f{k:<escape>v<escape>}<end_function_call>`."""

    MARKERS = ("<start_function_call>",)
    ENDS = ("<end_function_call>", "<start_function_response>")
    QUOTE = "<escape>"
    TYPED = True
