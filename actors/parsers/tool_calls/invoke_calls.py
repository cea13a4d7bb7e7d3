"""Calls in tags that are named `invoke` and `parameter`."""

from __future__ import annotations

from typing import ClassVar

from llm_runtime.actors.parsers.reader import Steps
from llm_runtime.actors.parsers.tool_calls.tagged_calls import TaggedCalls


class InvokeCalls(TaggedCalls):
    """A section, in it `invoke name="f"`, in it either an object in JSON or, for each parameter, `parameter name="k"`
    and its value. Models leave the tags of the section out at times, and the prefix of the names of tags."""

    SECTIONS: ClassVar[tuple[str, ...]] = ()
    """Names of the tags around the calls."""
    PREFIX: ClassVar[str] = ""
    """Before the names of tags."""

    def __init_subclass__(cls) -> None:
        prefixes = tuple(dict.fromkeys((cls.PREFIX, "")))
        cls.MARKERS = tuple(f"<{each}>" for each in cls.SECTIONS) + tuple(f"<{each}invoke" for each in prefixes)
        cls.ENDS = tuple(f"</{each}>" for each in cls.SECTIONS)
        cls.NEXT = tuple(f"<{each}parameter" for each in prefixes)
        cls.CLOSES = (f"</{cls.PREFIX}", "</parameter") if cls.PREFIX else ()
        cls.CALL_ENDS = tuple(f"</{each}invoke>" for each in prefixes) + cls.ENDS
        super().__init_subclass__()

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
            if (yield from self.accept(*self.ENDS)):
                self.drop()
            return True

    def _tag(self, opening: str, rest: str) -> Steps[str]:
        """Reads a tag's beginning with or without the prefix; gives what it has before its name."""
        found = yield from self.accept(opening + self.PREFIX + rest, opening + rest)
        return found.removesuffix(rest) if found else ""

    def _invoke(self) -> Steps[bool]:
        attributes = yield from self._attributes()
        name = attributes.get("name", "")
        if name not in self._tools:
            return False
        if (yield from self.accept("/>")):
            self.begin(name)
            self.end_members()
            return True
        if not (yield from self.accept(">")):
            return False
        yield from self.space()
        if (yield from self.peek()) == "{":
            if not (yield from self.object_arguments(name)):
                return False
            yield from self.end(*(each for each in self.CALL_ENDS if each not in self.ENDS))
            return True
        if (yield from self.peek()) != "<":
            return False
        self.begin(name)
        while True:
            yield from self.space()
            whole = bool((yield from self._tag("</", "invoke>"))) or (yield from self.after_tags())
            tag = "" if whole else (yield from self._tag("<", "parameter"))
            attributes = (yield from self._attributes()) if tag else {}
            key = attributes.get("name")
            if not key:
                self.end_members()
                return whole
            string = {"true": True, "false": False}.get(attributes.get("string", ""))
            if (yield from self.accept("/>")):
                self.empty_parameter(key)
                continue
            if not (yield from self.accept(">")):
                self.end_members()
                return False
            yield from self.parameter(key, f"</{tag[1:]}parameter>", string)

    def _attributes(self) -> Steps[dict[str, str]]:
        """Reads attributes of a tag, up to what ends it."""
        attributes: dict[str, str] = {}
        while True:
            yield from self.space()
            key = yield from self.word()
            yield from self.space()
            if not key or not (yield from self.accept("=")):
                return attributes
            yield from self.space()
            quote = yield from self.accept('"', "'")
            attributes[key] = (yield from self.word("_-.$: ")).strip()
            if quote and not (yield from self.accept(quote)):
                return {}
