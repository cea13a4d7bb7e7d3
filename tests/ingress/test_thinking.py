"""Thinking budgets under the names of all protocols: what the engine is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_runtime.actors.messages import Thinking
from llm_runtime.actors.parsers.reasoning import (
    REASONING_FORMATS,
    Markers,
    markers_after,
    reasoning_format,
    reasoning_markers,
)

from .conftest import Serve, Served, one_ingress
from .fakes import packed

CHAT, MESSAGES, NATIVE = "/v1/chat/completions", "/v1/messages", "/generate"
CLOSING = list(b"\n</think>\n\n")  # the fake tokenizer's
ENDS = ["</think>"]
INSIDE = Thinking(ENDS, "", 5, CLOSING)
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), reasoning_parser="qwen3-thinking") as served:
        served.fakes.opening = "<think>\n"
        yield served


def told(served: Served, path: str = CHAT, **fields: Any) -> Thinking | None:
    """What the engine is told of a request's reasoning."""
    base: dict[str, Any] = {}
    if path != NATIVE:
        base = {"model": "fake", "messages": [USER], "max_tokens": 3}
    response = served.client.post(path, json={**base, **fields})
    assert response.status_code == 200, response.text
    return served.fakes.seen.generates[-1].sampling.thinking


def refused(served: Served, path: str = CHAT, **fields: Any) -> str:
    """Why a request is refused."""
    base = {"model": "fake", "messages": [USER], "max_tokens": 3} if path != NATIVE else {}
    response = served.client.post(path, json={**base, **fields})
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_names_in_chats(shared: Served) -> None:
    assert told(shared) is None
    names: list[dict[str, Any]] = [
        {"thinking_budget": 5},
        {"thinking_token_budget": 5},
        {"custom_params": {"thinking_budget": 5}},
        {"thinking_budget": 5, "thinking_token_budget": 5},
    ]
    for fields in names:
        assert told(shared, **fields) == INSIDE
    assert told(shared, thinking_budget=0, separate_reasoning=False) == Thinking(ENDS, "", 0, CLOSING)
    message = refused(shared, thinking_budget=5, custom_params={"thinking_budget": 6})
    assert message == "thinking_budget and custom_params are names for one thing: send one of them."
    assert "reasoning_parser" not in refused(shared, custom_params={"thinking_budget": 5, "x": 1})


def test_where_the_reasoning_begins(shared: Served) -> None:
    outside = Thinking(ENDS, "<think>", 5, CLOSING)
    assert told(shared, thinking_budget=5, chat_template_kwargs={"enable_thinking": False}) == outside
    for begun, wanted in (("<think>Well", INSIDE), ("<think>Well</think>So", outside)):
        messages = [USER, {"role": "assistant", "content": begun}]
        assert told(shared, thinking_budget=5, messages=messages, continue_final_message=True) == wanted


def test_a_form_is_that_of_the_answer(shared: Served) -> None:
    json_object = {"type": "json_object"}
    assert told(shared, response_format=json_object) == Thinking(ENDS)
    assert told(shared, response_format=json_object, thinking_budget=5) == INSIDE
    assert told(shared, response_format=json_object, separate_reasoning=False) is None
    assert told(shared, response_format=json_object, chat_template_kwargs={"enable_thinking": False}) is None


def test_messages(shared: Served, serve: Serve) -> None:
    assert told(shared, MESSAGES, thinking={"type": "enabled", "budget_tokens": 5}) == INSIDE
    assert told(shared, MESSAGES, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=7) is not None
    assert told(shared, MESSAGES, thinking={"type": "disabled", "budget_tokens": 5}) is None
    assert told(shared, MESSAGES, thinking={"type": "adaptive"}) is None
    assert told(serve(), MESSAGES, thinking={"type": "enabled", "budget_tokens": 5}) is None


def test_generate(shared: Served) -> None:
    params = {"max_new_tokens": 3, "custom_params": {"thinking_budget": 5}}
    outside = Thinking(ENDS, "<think>", 5, CLOSING)
    prompts: list[tuple[Any, Thinking]] = [
        ("a<think>\n", INSIDE),
        ("a", outside),
        ("<think>b</think>", outside),
        (["a<think>", "b</think><think>"], INSIDE),
    ]
    for text, wanted in prompts:
        assert told(shared, NATIVE, text=text, sampling_params=params) == wanted
        last = text if isinstance(text, str) else text[-1]
        assert shared.fakes.seen.generates[-1].prompt == packed(last)
    assert told(shared, NATIVE, input_ids=list(b"a<think>"), sampling_params=params) == INSIDE
    assert told(shared, NATIVE, text="a<think>", sampling_params={"max_new_tokens": 3, "custom_params": {}}) is None
    assert "send the others apart" in refused(shared, NATIVE, text=["a<think>", "b"], sampling_params=params)


def test_markers_are_those_of_the_parsers() -> None:
    for name in REASONING_FORMATS:
        kind = reasoning_format(name)
        assert reasoning_markers(name, False) == Markers(kind.OPEN, [kind.CLOSE], kind.CLOSING)
        assert kind.CLOSE in kind.CLOSING or name == "granite"
        assert markers_after(name, f"a{kind.OPEN}b").start == ""
        assert markers_after(name, f"{kind.OPEN}{kind.CLOSE}").start == kind.OPEN
