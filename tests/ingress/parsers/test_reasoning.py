"""Reasoning in every format, alone and before tool calls."""

from __future__ import annotations

import random
from typing import Any

import pytest

from actors.ingress.parsers.events import Content, Parser, Reasoning
from actors.ingress.parsers.output import OutputParser
from actors.ingress.parsers.reasoning import REASONING_FORMATS, reasoning_parser
from actors.ingress.parsers.tool_calls import tool_call_parser

from .outputs import TOOLS, WRITERS, events_of, parsed, plain

# Outputs that begin before the reasoning: its tag is the model's.
OUTSIDE: list[tuple[str, list[Any]]] = [
    ("<think>I think.</think>I say.", [{"I think."}, "I say."]),
    ("<think>\nI think.\n</think>\n\nI say.\n", [{"I think."}, "I say.\n"]),
    ("\n<think>I think.</think>", [{"I think."}]),
    ("<think>I think", [{"I think"}]),
    ("<think>\n\n</think>\n\nI say.", ["I say."]),
    ("<think></think>", []),
    ("<think>", []),
    ("<thin", ["<thin"]),
    ("<thinking>no</thinking>", ["<thinking>no</thinking>"]),
    ("I say.", ["I say."]),
    ("\n\n I say. \n", ["\n\n I say. \n"]),
    ("I <think>say</think>.", ["I <think>say</think>."]),
    ("<think>a</thin b</think>c", [{"a</thin b"}, "c"]),
    ("<think>a</think>b</think>c", [{"a"}, "b</think>c"]),
    ("<think>a</think><think>b</think>", [{"a"}, "<think>b</think>"]),
    ("<think>東京 🗼\n\n  ü</think>é", [{"東京 🗼\n\n  ü"}, "é"]),
    ("<think>a </think", [{"a </think"}]),
    ("", []),
    ("  ", ["  "]),
]
# Outputs that begin inside it: the tag was in the prompt.
INSIDE: list[tuple[str, list[Any]]] = [
    ("I think.</think>I say.", [{"I think."}, "I say."]),
    ("\nI think.\n</think>\n\nI say.", [{"I think."}, "I say."]),
    ("<think>I think.</think>I say.", [{"I think."}, "I say."]),
    ("\n<think>\n I think.</think>", [{"I think."}]),
    ("I think", [{"I think"}]),
    ("</think>I say.", ["I say."]),
    ("</think>", []),
    ("<thi", [{"<thi"}]),
    ("a <think> b</think>c", [{"a <think> b"}, "c"]),
    ("a </thi", [{"a </thi"}]),
    ("a\n\n\nb</think>c", [{"a\n\n\nb"}, "c"]),
    ("a < b</think>3 > 2", [{"a < b"}, "3 > 2"]),
    ("é🙂</think>🙂</think>", [{"é🙂"}, "🙂</think>"]),
    ("", []),
    (" \n", []),
]
INTERRUPTED = "I think.\n<tool_call>\n{}"
FORMATS: dict[str, list[tuple[dict[str, Any], list[tuple[str, list[Any]]]]]] = {
    "deepseek-r1": [({}, INSIDE)],
    "deepseek-v3": [({"thinking": True}, INSIDE)],
    "glm45": [({}, OUTSIDE), ({}, [("<think>" + INTERRUPTED, [{"I think."}, "<tool_call>\n{}"])])],
    "qwen3": [
        ({}, OUTSIDE),
        ({"enable_thinking": True}, OUTSIDE),
        ({}, [("<think>" + INTERRUPTED, [{"I think."}, "<tool_call>\n{}"])]),
    ],
    "qwen3-thinking": [
        ({}, INSIDE),
        ({"enable_thinking": False}, OUTSIDE),
        ({}, [(INTERRUPTED, [{"I think."}, "<tool_call>\n{}"])]),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "text", "expected"),
    [(name, arguments, *case) for name, tables in FORMATS.items() for arguments, cases in tables for case in cases],
)
def test_reasoning(name: Any, arguments: dict[str, Any], text: str, expected: list[Any]) -> None:
    def make() -> Parser:
        parser = reasoning_parser(name, arguments)
        assert parser is not None
        return parser

    assert plain(parsed(make, text)) == expected


def test_every_format_has_cases() -> None:
    assert set(FORMATS) == set(REASONING_FORMATS)


def test_without_thinking_there_is_nothing_to_find() -> None:
    assert reasoning_parser("deepseek-v3", {}) is None
    assert reasoning_parser("deepseek-v3", {"thinking": False}) is None


@pytest.mark.parametrize(
    ("continued", "expected"),
    [
        ("<think>I", [{"go on"}, "x"]),
        ("<think>I</think>So", ["go on</think>x"]),
        ("So", ["go on</think>x"]),
    ],
)
def test_an_answer_that_goes_on(continued: str, expected: list[Any]) -> None:
    for name in REASONING_FORMATS:
        parser = reasoning_parser(name, {"thinking": True}, continued)
        assert parser is not None
        assert plain(events_of(parser, ["go on</think>x"])) == expected


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_random_texts(name: Any) -> None:
    """At most the two tags go, each once, and white space."""
    chance = random.Random(name)
    tokens = ["<think>", "</think>", "<tool_call>", "a", " ", "\n", "<", "</", "think>", "é"]

    def make() -> Parser:
        parser = reasoning_parser(name, {"thinking": True})
        assert parser is not None
        return parser

    for _ in range(200):
        text = "".join(chance.choices(tokens, k=chance.randrange(12)))
        given = "".join(event.text for event in parsed(make, text) if isinstance(event, Content | Reasoning))
        opened, closed = text.replace("<think>", "", 1), text.replace("</think>", "", 1)
        both = opened.replace("</think>", "", 1)
        assert "".join(given.split()) in ["".join(each.split()) for each in (text, opened, closed, both)]


WEATHER = ("get_weather", {"city": "Paris"})


def output(**options: Any) -> OutputParser:
    return OutputParser(reasoning_parser("qwen3", {}), tool_call_parser("qwen25", TOOLS), **options)


def test_reasoning_before_calls() -> None:
    call = WRITERS["qwen25"][1]([WEATHER, ("now", {})])
    text = f"<think>\nMaybe <tool_cal or {{}}.\n</think>\n\n{call}\n"
    expected = [{"Maybe <tool_cal or {}."}, ("get_weather", '{"city": "Paris"}'), ("now", "{}")]
    assert plain(parsed(output, text)) == expected
    assert plain(parsed(output, f"<think>I look.\n{call}")) == [{"I look."}, *expected[1:]]
    assert plain(parsed(output, f"Hm.\n{call}")) == ["Hm.", *expected[1:]]


def test_one_call_only() -> None:
    call = WRITERS["qwen25"][1]([WEATHER, ("now", {}), WEATHER])
    found = plain(parsed(lambda: output(parallel_calls=False), f"Hm.\n{call}\nBye"))
    assert found == ["Hm.", ("get_weather", '{"city": "Paris"}'), "\nBye"]


def test_reasoning_at_once() -> None:
    parser = output(stream_reasoning=False)
    assert parser.feed("<think>one") == []
    assert parser.feed(" two") == []
    assert parser.feed("</think>thr") == [Reasoning("one two"), Content("thr")]
    assert parser.feed("ee") == [Content("ee")]
    assert parser.finish() == []
    parser = output(stream_reasoning=False)
    assert parser.feed("<think>one") == []
    assert parser.finish() == [Reasoning("one")]
