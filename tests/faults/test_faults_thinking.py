"""A thinking budget of a served model: the reasoning ends at it, streamed or not, and whoever dies meanwhile."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from faults_tools import DEADLINE_S, Node

CLOSING = "\n</think>\n\n"
BUDGET, TOKENS = 12, 32
BODY: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "one two three four five six seven eight " * 6}],
    "max_tokens": TOKENS,
    "temperature": 0.0,
    "ignore_eos": True,
    "logprobs": True,
}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that takes its model's outputs to begin with reasoning."""
    made = Node(tmp_path_factory.mktemp("f"), "ingress.reasoning_parser=deepseek-r1", "engine.main.speculation=ngram")
    try:
        yield made.up()
    finally:
        made.close()


class Answer(NamedTuple):
    reasoning: str
    content: str
    tokens: list[str]


def streamed(node: Node, after: Mapping[int, Callable[[], None]], **fields: Any) -> Answer:
    """An answer in pieces. `after` is called when so many of them have arrived."""
    body = json.dumps({**BODY, "stream": True, **fields}).encode()
    request = urllib.request.Request(f"{node.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    reasoning, content, tokens, pieces = "", "", [], 0
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as events:
        for line in events:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                reasoning += choice["delta"].get("reasoning_content", "")
                content += choice["delta"].get("content", "")
                tokens += [each["token"] for each in (choice["logprobs"] or {"content": []})["content"]]
                pieces += 1
                if pieces in after:
                    after[pieces]()
    return Answer(reasoning, content, tokens)


def whole(node: Node, **fields: Any) -> Answer:
    choice = node.post("/v1/chat/completions", {**BODY, **fields})["choices"][0]
    message = choice["message"]
    tokens = [each["token"] for each in choice["logprobs"]["content"]]
    return Answer(message.get("reasoning_content") or "", message["content"] or "", tokens)


def test_reasoning_ends_at_its_budget_whoever_dies(thinking: Node) -> None:
    free = whole(thinking)
    assert free.content == ""
    wanted = whole(thinking, thinking_budget=BUDGET)
    assert wanted.tokens[:BUDGET] == free.tokens[:BUDGET]
    assert wanted.reasoning == "".join(free.tokens[:BUDGET]).strip()
    behind = "".join(wanted.tokens[BUDGET:])
    assert behind.startswith(CLOSING)
    assert wanted.content == behind.removeprefix(CLOSING).lstrip()
    assert len(wanted.content) > 10
    assert streamed(thinking, {}, thinking_budget=BUDGET) == wanted
    kills = {
        5: lambda: thinking.kill("main.rank0"),
        11: lambda: thinking.kill("main.scheduler"),
        14: lambda: thinking.kill("main.rank0"),
    }
    assert streamed(thinking, kills, thinking_budget=BUDGET) == wanted
    for name in ("main.rank0", "main.scheduler"):
        assert thinking.actor(name).restarts >= 1


def test_no_reasoning_and_an_answer_in_a_form(thinking: Node) -> None:
    form = {"temperature": 1.0, "seed": 3, "regex": "[0-9]{4}", "ignore_eos": False, "logprobs": False}
    body = {**BODY, "thinking_budget": 0, **form}
    message = thinking.post("/v1/chat/completions", body)["choices"][0]["message"]
    assert not message.get("reasoning_content")
    assert re.fullmatch("[0-9]{4}", message["content"])
    thinks = {"type": "enabled", "budget_tokens": 6}
    blocks = thinking.post(
        "/v1/messages", {**{key: BODY[key] for key in ("model", "messages", "max_tokens")}, "thinking": thinks}
    )["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
