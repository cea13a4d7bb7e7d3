"""Reasoning in every format, alone and before tool calls."""

from __future__ import annotations

import random
import re
from functools import partial
from typing import Any

import pytest

from llm_runtime.actors.parsers.events import Content, Reasoning
from llm_runtime.actors.parsers.output import OutputParser
from llm_runtime.actors.parsers.reasoning import REASONING_FORMATS, reasoning_format, reasoning_parser
from llm_runtime.actors.parsers.tool_calls import tool_call_parser

from .outputs import TOOLS, WRITERS, parsed, plain

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
    ("<think><think>a</think>b", [{"a"}, "b"]),
    ("<think>\n<think> a</think>b", [{"a"}, "b"]),
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
CALL = '<tool_call>\n{"name": "now"}\n</tool_call>'
KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>f"
MENTIONED = "I could use <tool_call> markup. Hmm.\n</think>\nAnswer"
# Outputs that begin inside, of formats whose models may call tools without leaving the reasoning.
WITH_CALLS: list[tuple[str, list[Any]]] = [
    (f"I think.\n{CALL}", [{"I think."}, CALL]),
    (f"I think.\n{CALL}\nSo", [{"I think."}, f"{CALL}\nSo"]),
    (MENTIONED, [{"I could use <tool_call> markup. Hmm."}, "Answer"]),
    (f"Such as {CALL}, yes.</think>Answer", [{f"Such as {CALL}, yes."}, "Answer"]),
    ("Or <tool_call> or a <tool_call>", [{"Or <tool_call> or a"}, "<tool_call>"]),
    ("<tool_call>", ["<tool_call>"]),
]
HARMONY: list[tuple[str, list[Any]]] = [
    (
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>final<|message|>I say.<|return|>",
        [{"I think."}, "I say."],
    ),
    ("<|channel|>final<|message|>I say.", ["I say."]),
    ("<|channel|>analysis<|message|>I th", [{"I th"}]),
    ("<|channel|>analysis<|mess", []),
    ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", [{"a"}, "b"]),
    ("<|channel|>commentary<|message|>I look.<|end|>", ["I look."]),
    ('<|channel|>analysis<|message|>a<|end|>[{"name": "now"}]', [{"a"}, '[{"name": "now"}]']),
    ("I say.", ["I say."]),
    ("", []),
]


def renamed(cases: list[tuple[str, list[Any]]], start: str, end: str) -> list[tuple[str, list[Any]]]:
    """The cases with other tags; those with parts of tags are left out."""

    def other(part: Any) -> Any:
        if isinstance(part, set):
            return {other(each) for each in part}
        return part.replace("<think>", start).replace("</think>", end)

    whole = [case for case in cases if not re.search("<(?!/?think>)", case[0])]
    return [(other(text), [other(part) for part in expected]) for text, expected in whole]


FORMATS: dict[str, tuple[list[tuple[str, list[Any]]], list[tuple[str, list[Any]]]]] = {
    "deepseek-r1": (OUTSIDE, INSIDE),
    "deepseek-v3": (OUTSIDE, INSIDE),
    "olmo3": (OUTSIDE, INSIDE),
    "glm45": (OUTSIDE, INSIDE + WITH_CALLS),
    "qwen3": (
        [*OUTSIDE, (f"<think>I think.\n{CALL}", [{"I think."}, CALL]), (f"Yes. {CALL}", [f"Yes. {CALL}"])],
        INSIDE + WITH_CALLS,
    ),
    "kimi_k2": (
        OUTSIDE,
        [
            *INSIDE,
            (
                "a <|tool_calls_section_begin|><|tool_call_begin|>f",
                [{"a"}, "<|tool_calls_section_begin|><|tool_call_begin|>f"],
            ),
        ],
    ),
    "minimax": (OUTSIDE, INSIDE),
    "step3": (OUTSIDE, INSIDE),
    "ernie45": (
        [*OUTSIDE, ("<think>a</think>\n\n<response>\nb\n</response>\n", [{"a"}, "b"])],
        [
            *INSIDE,
            ("a\n</think>\n\n<response>\nb", [{"a"}, "b"]),
            ("a</think>\n</response> c", [{"a"}, "</response> c"]),
        ],
    ),
    "hunyuan": (
        [*OUTSIDE, ("<think>\na\n</think>\n<answer>\nb\n</answer>", [{"a"}, "b"]), ("<answer>b</answer>", ["b"])],
        INSIDE,
    ),
    "granite": (
        [
            *OUTSIDE,
            ("Here is my thought process: a Here is my response: b", [{"a"}, "b"]),
            ("Here's my thought process:\n\na\n\nHere's my response:\n\nb", [{"a"}, "b"]),
            ("Here is my thought process: a Here is my", [{"a Here is my"}]),
            ("Here is my house", ["Here is my house"]),
            ("<think>a</think><response>b</response>", [{"a"}, "b"]),
        ],
        INSIDE,
    ),
    "kimi": (renamed(OUTSIDE, "◁think▷", "◁/think▷"), renamed(INSIDE, "◁think▷", "◁/think▷")),
    "mistral": (renamed(OUTSIDE, "[THINK]", "[/THINK]"), renamed(INSIDE, "[THINK]", "[/THINK]")),
    "seed_oss": (
        renamed(OUTSIDE, "<seed:think>", "</seed:think>"),
        renamed(INSIDE, "<seed:think>", "</seed:think>"),
    ),
    "gemma4": (
        [*renamed(OUTSIDE, "<|channel>", "<channel|>"), ("<|channel>thought\na<channel|>b", [{"a"}, "b"])],
        renamed(INSIDE, "<|channel>", "<channel|>"),
    ),
    "cohere_command4": (
        [("<|START_THINKING|>a<|END_THINKING|><|START_TEXT|>b<|END_TEXT|>", [{"a"}, "b"])],
        [
            ("a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", [{"a"}, "b"]),
            ("a<|END_THINKING|><|START_ACTION|>[]<|END_ACTION|>", [{"a"}, "<|START_ACTION|>[]<|END_ACTION|>"]),
        ],
    ),
    "gpt-oss": (HARMONY, [("a<|end|><|start|>assistant<|channel|>final<|message|>b", [{"a"}, "b"])]),
}


@pytest.mark.parametrize(
    ("name", "inside", "text", "expected"),
    [
        (name, inside, *case)
        for name, tables in FORMATS.items()
        for inside, cases in enumerate(tables)
        for case in cases
    ],
)
def test_reasoning(name: str, inside: int, text: str, expected: list[Any]) -> None:
    assert plain(parsed(lambda: reasoning_parser(name, bool(inside)), text)) == expected


def test_every_format_has_cases() -> None:
    assert set(FORMATS) == set(REASONING_FORMATS)


@pytest.mark.parametrize(
    ("name", "prompt", "inside"),
    [
        ("qwen3", "assistant\n<think>\n", True),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "user\nwhat is <think>?\nassistant\n", False),
        ("deepseek-r1", "<｜Assistant｜>", True),
        ("deepseek-r1", "<｜Assistant｜><think>\n", True),
        ("deepseek-v3", "<｜Assistant｜></think>", False),
        ("deepseek-v3", "<｜Assistant｜><think>", True),
        ("gemma4", "model\n<|channel>thought\n", True),
        ("gpt-oss", "<|start|>assistant", False),
        ("mistral", "[/INST]", False),
    ],
)
def test_the_prompt_tells_where_an_output_begins(name: str, prompt: str, inside: bool) -> None:
    assert reasoning_format(name).begins_inside(prompt) == inside


def test_an_answer_that_goes_on() -> None:
    for text, inside in (("<think>I", True), ("<think>I</think>So", False), ("So", False)):
        for name in ("qwen3", "deepseek-r1", "glm45"):
            assert reasoning_format(name).goes_on_inside(text) == inside


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3", "ernie45"])
def test_random_texts(name: str) -> None:
    """At most the tags go, and white space."""
    chance = random.Random(name)
    tokens = [
        "<think>",
        "</think>",
        "<tool_call>",
        "{",
        "a",
        " ",
        "\n",
        "<",
        "</",
        "think>",
        "é",
        "<response>",
        "</response>",
    ]

    for _ in range(200):
        text = "".join(chance.choices(tokens, k=chance.randrange(12)))
        for inside in (False, True):
            found = parsed(partial(reasoning_parser, name, inside), text)
            given = "".join(event.text for event in found if isinstance(event, Content | Reasoning))
            rest = iter("".join(text.split()))
            assert all(character in rest for character in "".join(given.split()))
            lost = len("".join(text.split())) - len("".join(given.split()))
            assert lost <= len("<think>") * text.count("<think>") + len("</think><response></response>")


WEATHER = ("get_weather", {"city": "Paris"})


def output(**options: Any) -> OutputParser:
    return OutputParser(reasoning_parser("qwen3", False), tool_call_parser("qwen25", TOOLS), **options)


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
