"""A constrained answer, or one whose reasoning has a budget, is the same when processes die while it is drawn."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from faults_tools import DisturbedNode, assert_unnoticed
from support import DEADLINE_S, eventually
from test_faults_speculation import complete

from llm_runtime.runtime.chaos.run import Load

NODE = ("ingress.reasoning_parser=qwen3",)
LIST = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 5, "maxItems": 6}
SAMPLING = {"temperature": 1.0, "seed": 5, "max_tokens": 80, "ignore_eos": False}
BUDGET, CLOSING = 9, "\n</think>\n\n"
THINKS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "<think>\nI"}],
    "continue_final_message": True,
    "max_tokens": 30,
    "temperature": 0.0,
    "ignore_eos": True,
    "logprobs": True,
    "skip_special_tokens": False,
}
"""A chat whose answer begins inside its reasoning."""


def answer(node: DisturbedNode, after: Mapping[int, Callable[[], None]], schema: object = LIST) -> str:
    return complete(node, "Fruits, as JSON: ", {**SAMPLING, "guided_json": schema}, after)


def test_the_same_answer_whoever_dies(node: DisturbedNode) -> None:
    wanted = answer(node, {})
    assert 5 <= len(json.loads(wanted)) <= 6
    kills = {
        3: lambda: node.kill("main.rank0"),
        9: lambda: node.kill("main.scheduler"),
        12: lambda: node.kill("main.grammar"),
        14: lambda: node.kill("main.rank0"),
        15: lambda: node.kill("main.scheduler"),
    }
    assert answer(node, kills) == wanted
    for name in ("main.rank0", "main.scheduler", "main.grammar"):
        eventually(lambda name=name: node.actor(name).restarts >= 1, f"the restart of {name}")


def test_streams_of_json_and_of_calls_whoever_dies(node: DisturbedNode) -> None:
    """Every process, the ingress too; supervisors after those below them, which are away for a moment then."""
    names = [each.name for each in node.tree().walk()][:0:-1]
    schedule = [(0.4 + 0.4 * number, name, "KILL") for number, name in enumerate(names)]
    outcome = node.disturb(schedule, load=Load(streams=3, structured=True, timeout_s=90.0))
    assert_unnoticed(outcome)
    assert {fault.actor for fault in outcome.faults} == set(names)
    for answer in outcome.answers:
        text = answer.choices[0].text
        assert json.loads(text[min(at for at in (text.find("{"), text.find("[")) if at >= 0) :])


def test_a_constraint_is_compiled_though_the_compiler_is_killed(node: DisturbedNode) -> None:
    for number in range(2):
        node.kill("main.grammar")
        assert json.loads(answer(node, {}, {"enum": [f"a{number}", "b"]})) in (f"a{number}", "b")


def reasoned(node: DisturbedNode, after: Mapping[int, Callable[[], None]], **fields: Any) -> tuple[str, str, list[str]]:
    """Reasoning, content and tokens of a streamed answer. `after` is called when so many pieces have arrived."""
    body = json.dumps({**THINKS, "stream": True, **fields}).encode()
    request = urllib.request.Request(f"{node.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    texts, tokens, pieces = {"reasoning_content": "", "content": ""}, [], 0
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as events:
        for line in events:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                for name in texts:
                    texts[name] += choice["delta"].get(name, "")
                tokens += [each["token"] for each in (choice["logprobs"] or {"content": []})["content"]]
                pieces += 1
                if pieces in after:
                    after[pieces]()
    return texts["reasoning_content"], texts["content"], tokens


def test_reasoning_ends_at_its_budget_whoever_dies(node: DisturbedNode) -> None:
    free_reasoning, nothing, free = reasoned(node, {})
    assert (free_reasoning, nothing) == ("".join(free).strip(), "")
    reasoning, content, tokens = wanted = reasoned(node, {}, thinking_budget=BUDGET)
    assert tokens[:BUDGET] == free[:BUDGET]
    assert reasoning == "".join(free[:BUDGET]).strip()
    assert "".join(tokens[BUDGET:]).startswith(CLOSING)
    assert content == "".join(tokens[BUDGET:]).removeprefix(CLOSING).lstrip() != ""
    message = node.post("/v1/chat/completions", {**THINKS, "thinking_budget": BUDGET})["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (reasoning, content)
    kills = {
        5: lambda: node.kill("main.rank0"),
        BUDGET + 3: lambda: node.kill("main.scheduler"),
    }
    before = [node.actor(name).restarts for name in ("main.rank0", "main.scheduler")]
    assert reasoned(node, kills, thinking_budget=BUDGET) == wanted
    eventually(
        lambda: [node.actor(name).restarts for name in ("main.rank0", "main.scheduler")] == [n + 1 for n in before],
        "one restart each",
    )


def test_a_form_is_that_of_what_follows_the_reasoning(node: DisturbedNode) -> None:
    form = {"temperature": 1.0, "seed": 3, "regex": "[0-9]{4}", "ignore_eos": False}
    for fields in ({"thinking_budget": 3}, {"thinking_budget": 0}):
        reasoning, content, _ = reasoned(node, {}, **form, **fields)
        assert re.fullmatch("[0-9]{4}", content.removesuffix("<|im_end|>"))
        assert bool(reasoning) == bool(fields["thinking_budget"])
