"""JSON (RFC 8259) in text that arrives in pieces, read as leniently as models write it."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, NoReturn

import msgspec

MAX_DEPTH = 128

_SPACE = re.compile(r"\s*")
_KEY = re.compile(r"[\w$.-]*")
_WORD = re.compile(r"[^,{}\[\]()\"'<\n\r]*")
_HEX = "[0-9a-fA-F]{4}"
_ESCAPE = re.compile(
    rf'\\(?:["\\/bfnrt]|u[dD][89abAB][0-9a-fA-F]{{2}}\\u[dD][c-fC-F][0-9a-fA-F]{{2}}|u(?![dD][89a-fA-F]){_HEX})'
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,4}|u[dD][89abAB][0-9a-fA-F]{2}\\(?:u[0-9a-fA-F]{0,3})?)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ODD_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", **dict.fromkeys(("null", "none", "undefined", "nan", "infinity"), "null")}
_CLOSING = {"{": "}", "[": "]"}
QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”"}
"""With what strings begin, and what ends them."""
_QUOTED_KEY = re.compile(r"""(["'`“])(?:[^"'`”\\\n]|\\.){0,128}["'`”]\s{0,64}""")
_BEGUN_QUOTED_KEY = re.compile(r"""["'`“](?:[^"'`”\\\n]|\\.){0,128}\\?""")
_BARE_KEY = re.compile(r"[^\W\d][\w$-]{0,63}\s{0,64}")
_HEXADECIMAL = re.compile(r"([-+]?)0[xX]([0-9a-fA-F]{1,16})")
_COMMENT = re.compile(r"\s*(?://|/\*|#)")
_SOME_SPACE = re.compile(r"\s{0,256}")
_MAX_COMMENT = 4096
_STOP_SPACE = 64
"""White space behind a literal that may end a string, before the literal counts as a part of the string."""


class LenientJson:
    """Turns one value that is meant as JSON into JSON, character by character. What is JSON stays as it is.

    Repaired are: control characters and wrong escapes in strings, other quotes, quotes that do not end a string, keys
    and words without quotes, Python's True, False, None and tuples, numbers such as .5, 007, 0x1F or 1_000, comments,
    surplus and missing commas, a missing value, doubled braces, and brackets that are missing or do not fit.

    Args:
        stops: literals that come behind the value. One of them ends it wherever it may end, and inside a string if
            nothing but white space follows.

    Attributes:
        done: the value has ended; only objects, arrays and strings end by themselves.
        failed: what comes next cannot be part of a value.
    """

    __slots__ = (
        "_closing",
        "_doubled",
        "_expect",
        "_gap",
        "_open",
        "_out",
        "_plain",
        "_quote",
        "_stops",
        "_word",
        "done",
        "failed",
    )

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self.done = False
        self.failed = False
        self._stops = stops
        self._plain = re.compile("")
        self._out: list[str] = []
        self._gap: list[str] = []  # what comes before the next value, given out with it: comma, space, key and colon
        self._open: list[str] = []
        self._doubled: set[int] = set()  # how many were open behind braces that came twice
        self._expect = "value"
        self._quote = ""  # of the string that is being read
        self._closing: list[str] | None = None  # white space behind a quote that may end the string
        self._word: list[str] | None = None

    def take(self) -> str:
        """The JSON that has become certain."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def scan(self, text: str, at: int) -> int:
        """Where the value ends, or what cannot be part of it begins, or what needs more text to be understood."""
        size = len(text)
        while at < size and not self.done and not self.failed:
            before = at
            if self._closing is not None:
                at = self._end_of_string(text, at)
            elif self._quote:
                at = self._string(text, at)
            elif self._word is not None:
                at = self._go_on_with_word(text, at)
            else:
                at = self._structure(text, at)
            if at < 0:
                return before
        return at

    def close(self) -> str:
        """No more of the value comes: what makes JSON of it. Empty if it was whole."""
        if self.done:
            return self.take()
        if self._quote:
            self._out.append('"' if self._expect != "colon" else "")
        elif self._word is not None and "".join(self._word).strip().lower() in _WORDS:
            self._end_word()
        self._out += [_CLOSING[each] for each in reversed(self._open)]
        self._open.clear()
        return self.take()

    # -- strings ----------------------------------------------------------------------------------------------------

    def _put(self, text: str) -> None:
        """More of a string."""
        (self._gap if self._expect == "colon" else self._out).append(text)

    def _string(self, text: str, at: int) -> int:
        match = self._plain.match(text, at)
        assert match is not None
        if match.end() > at:
            self._put(match.group())
            return match.end()
        character = text[at]
        if character == "\\":
            return self._escape(text, at)
        if character == self._quote:
            self._closing = []
            if not self._open:
                self._string_ended()
        elif character < " ":
            self._put(json.dumps(character)[1:-1])
        elif character in "\"'":
            self._put('\\"' if character == '"' else "'")
        else:
            return self._stop_in_string(text, at)
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        match = _ESCAPE.match(text, at)
        if match is not None:
            self._put(match.group())
            return match.end()
        if _BEGUN_ESCAPE.fullmatch(text, at):
            return -1
        if _SURROGATE.match(text, at):
            self._put("\\ufffd")  # half of a character cannot be sent
            return at + 6
        following = text[at + 1]
        if following == "'":
            self._put("'")
        elif following == "\n":
            self._put("\\n")
        else:
            self._put("\\\\")
            return at + 1
        return at + 2

    def _stop_in_string(self, text: str, at: int) -> int:
        """At a character with which a stop begins."""
        rest = text[at : at + max(map(len, self._stops))]
        stop = next((each for each in self._stops if rest.startswith(each)), "")
        if not stop:
            if any(each.startswith(rest) for each in self._stops) and at + len(rest) == len(text):
                return -1
            self._put(text[at])
            return at + 1
        behind = text[at + len(stop) : at + len(stop) + _STOP_SPACE]
        following = at + len(stop) + len(behind) - len(behind.lstrip())
        if text.startswith(self._stops, following):
            self.failed = True
            return at
        if len(behind) < _STOP_SPACE and any(each.startswith(text[following:]) for each in self._stops):
            return -1
        self._put(stop)
        return at + len(stop)

    def _end_of_string(self, text: str, at: int) -> int:
        """Behind a quote that ends the string if what follows may follow a string."""
        assert self._closing is not None
        if text[at].isspace():
            match = _SPACE.match(text, at)
            assert match is not None
            self._closing.append(match.group())
            return match.end()
        character, space = text[at], "".join(self._closing)
        if self._expect == "colon":
            ends = character in ":=,}"
        elif character in "}])" or (character in QUOTES and "\n" in space):
            ends = True
        elif character in ",;" and self._open[-1] == "[":
            ends = character == ","
        elif character in ",;" or (character in QUOTES and self._open[-1] == "{"):
            member = _member_follows(text, at + (character in ",;"))
            if member is None:
                return -1
            ends = member
        elif character == "/" and space:
            if at + 1 == len(text):
                return -1
            ends = text[at + 1] in "/*"
        else:
            ends = character == "#" and bool(space)
        if not ends and self._stops:
            rest = text[at : at + max(map(len, self._stops))]
            ends = rest.startswith(self._stops)
            if not ends and any(each.startswith(rest) for each in self._stops):
                return -1
        if ends:
            self._string_ended()
        else:
            self._closing = None
            self._put('\\"' if self._quote == '"' else self._quote)
            self._put(json.dumps(space)[1:-1])
        return at

    def _string_ended(self) -> None:
        space = "".join(self._closing or ())
        self._closing, self._quote = None, ""
        self._put('"')
        if self._expect != "colon":
            self._value_ended()
        if self._open:
            self._gap.append(space)

    # -- numbers and words --------------------------------------------------------------------------------------------

    def _go_on_with_word(self, text: str, at: int) -> int:
        assert self._word is not None
        match = (_KEY if self._expect == "colon" else _WORD).match(text, at)
        assert match is not None
        self._word.append(match.group())
        if match.end() < len(text):
            if self._expect != "colon" and text[match.end()] in "\"'({[":
                self._word, self.failed = None, True  # a call, or a string with a prefix
            else:
                self._end_word()
        return match.end()

    def _end_word(self) -> None:
        whole = "".join(self._word or ())
        word = whole.strip()
        remark = _COMMENT.search(word)
        if remark is not None and (_WORDS.get(word[: remark.start()].lower()) or _number(word[: remark.start()])):
            word = word[: remark.start()]
        self._word = None
        if self._expect == "colon":
            self._gap.append(quoted(word))
            return
        self._begin_value()
        self._out.append(_WORDS.get(word.lower()) or _number(word) or quoted(word))
        self._value_ended()
        self._gap.append(whole[len(whole.rstrip()) :])

    # -- structure ----------------------------------------------------------------------------------------------------

    def _structure(self, text: str, at: int) -> int:
        character = text[at]
        if character.isspace() and self._open:
            match = _SPACE.match(text, at)
            assert match is not None
            self._gap.append(match.group())
            return match.end()
        expect = self._expect
        if self._open and (character in "/#"):
            behind = self._behind_comment(text, at)
            if behind:
                return behind
        if character == "}" and len(self._open) in self._doubled:
            if at + 1 == len(text):
                return -1
            self._doubled.discard(len(self._open))
            at += text[at + 1] == "}"
        if character in "}])" and self._open and expect != "colon":
            self._close(character)
        elif expect == "comma":
            return self._next_member(text, at)
        elif character == "," and self._open:
            if expect == "value" and self._open[-1] == "{":
                self._begin_value()
                self._out.append("null")
                self._value_ended()
                return at
        elif expect == "key":
            if character in QUOTES:
                self._expect = "colon"
                self._begin_string(character)
                self._gap.append('"')
            elif character == "{" and "".join(self._gap).strip() in ("", ","):
                self._doubled.add(len(self._open))
            elif character.isalpha() or character in "_$":
                self._word, self._expect = [], "colon"
                return at
            else:
                self.failed = True
                return at
        elif expect == "colon":
            self.failed = character not in ":="
            if self.failed:
                return at
            self._gap.append(":")
            self._expect = "value"
        elif character in "{[(" and len(self._open) < MAX_DEPTH and (character != "(" or self._open):
            self._begin_value()
            kind = "{" if character == "{" else "["
            self._out.append(kind)
            self._open.append(kind)
            self._expect = "key" if kind == "{" else "value"
        elif character in QUOTES:
            self._begin_value()
            self._begin_string(character)
            self._out.append('"')
        elif (character.isalnum() or character in "+-._$/~#@*") and self._open:
            self._word = []
            return at
        else:
            self.failed = True
            return at
        return at + 1

    def _next_member(self, text: str, at: int) -> int:
        character = text[at]
        if character not in ",;" and character not in QUOTES and character not in "{[":
            self.failed = True
            return at
        self._gap.append(",")
        self._expect = "key" if self._open[-1] == "{" else "value"
        return at + (character in ",;")

    def _behind_comment(self, text: str, at: int) -> int:
        """Behind a comment; -1 if it goes on, 0 if there is none."""
        if at + 1 == len(text):
            return -1
        if text[at] == "#":
            if self._expect == "value" and text[at + 1] != " ":
                return 0
        elif text[at + 1] not in "/*":
            return 0
        end = "*/" if text.startswith("/*", at) else "\n"
        ends = [text.find(each, at + 1) for each in (end, *self._stops)]
        found = min((each for each in ends if each >= 0), default=-1)
        if found < 0:
            self.failed = len(text) - at > _MAX_COMMENT
            return -1
        return found + (2 if found == ends[0] and end == "*/" else 0)

    def _begin_string(self, character: str) -> None:
        self._quote = QUOTES[character]
        self._plain = _plain("".join(sorted({self._quote, *(stop[0] for stop in self._stops)})))

    def _begin_value(self) -> None:
        self._out += self._gap
        self._gap.clear()

    def _value_ended(self) -> None:
        self._expect = "comma"
        self.done = not self._open

    def _close(self, character: str) -> None:
        """A closing bracket ends what it fits, and all inside of that. One that fits nothing is surplus."""
        kind = "{" if character == "}" else "["
        if kind not in self._open:
            return
        if self._expect == "value" and self._open[-1] == "{":
            self._begin_value()
            self._out.append("null")
        space = "".join(each for each in self._gap if each.isspace())
        self._gap.clear()
        self._out.append(space)
        while self._open:
            last = self._open.pop()
            self._out.append(_CLOSING[last])
            if last == kind:
                break
        self._value_ended()


def _member_follows(text: str, at: int) -> bool | None:
    """Whether the next member of an object comes next, or its end; None if more text must tell."""
    match = _SOME_SPACE.match(text, at)
    assert match is not None
    at = match.end()
    if at == len(text):
        return None
    if text[at] in ",;}])/#{[" or text[at].isspace():
        return True
    pattern, begun = (_QUOTED_KEY, _BEGUN_QUOTED_KEY) if text[at] in QUOTES else (_BARE_KEY, _BARE_KEY)
    key = pattern.match(text, at)
    if key is not None and key.end() < len(text):
        return text[key.end()] in ":="
    return None if key is not None or begun.fullmatch(text, at) else False


def _number(word: str) -> str:
    """A number as JSON, JSON5 or Python write it; empty for other words."""
    match = _HEXADECIMAL.fullmatch(word)
    if match is not None:
        return f"{match[1].replace('+', '')}{int(match[2], 16)}"
    if word[:1] in "+-" and word[1:].lower() in ("infinity", "inf", "nan"):
        return "null"
    return json_number(re.sub(r"(?<=[0-9])_(?=[0-9])", "", word))


@cache
def _plain(also: str) -> re.Pattern[str]:
    """What may stand in a string as it is."""
    return re.compile(rf"[^\"'\\\x00-\x1f{re.escape(also)}]*")


def repaired(text: str) -> str | None:
    """JSON of an object or array that is meant as one, with nothing around it; None if the text is none."""
    scanner = LenientJson()
    if text[:1] not in ("{", "[") or scanner.scan(text, 0) != len(text) or not scanner.done:
        return None
    return scanner.take()


def is_json(text: str) -> bool:
    """Whether a text is one JSON value with nothing around it."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return text[:1].strip() != "" and text[-1:].strip() != ""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def json_number(text: str) -> str:
    """A number, which may be written as JSON does not allow it: +1, 007, .5, 1. Empty for other texts."""
    if _NUMBER.fullmatch(text):
        return text
    if not _ODD_NUMBER.fullmatch(text):
        return ""
    text = text.removeprefix("+")
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    digits = digits.lstrip("0")
    if not digits[:1].isdigit():
        digits = "0" + digits
    found = re.sub(r"\.(?![0-9])", "", sign + digits)
    return found if _NUMBER.fullmatch(found) else ""


def string_value(text: str) -> str | None:
    """What a JSON string stands for; None for other values. The text must be JSON."""
    if not text.startswith('"'):
        return None
    value = json.loads(text)
    assert isinstance(value, str)
    return value.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def object_of(text: str) -> dict[str, Any]:
    """A call's arguments; empty if the output has ended before they were an object."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}
