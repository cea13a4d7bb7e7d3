"""What vLLM, SGLang and OpenAI's older clients ask for beside the usual fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llm_runtime.actors.ingress.openai.logprobs import token_name
from llm_runtime.actors.messages import ChatPrompt

from .conftest import Serve, Served, chunks_of, one_ingress
from .fakes import packed
from .test_tools import NOW, PARIS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
FUNCTIONS = [
    {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "now"},
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), tool_call_parser="qwen25", reasoning_parser="qwen3") as served:
        served.fakes.per_step = 3
        yield served


@pytest.fixture(autouse=True)
def _no_script(shared: Served) -> Iterator[None]:
    yield
    shared.fakes.script = None


def answers(served: Served, path: str = CHAT, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer to a request at once, and in chunks."""
    base = ASK if path == CHAT else {"prompt": "hi", "max_tokens": 6}
    response = served.client.post(path, json={**base, **fields})
    assert response.status_code == 200, response.text
    return response.json(), chunks_of(served.client.post(path, json={**base, **fields, "stream": True}).text)


def deltas(chunks: list[dict[str, Any]], name: str) -> list[Any]:
    return [chunk["choices"][0]["delta"][name] for chunk in chunks if name in chunk["choices"][0]["delta"]]


def test_functions_are_answered_in_their_own_shape(shared: Served) -> None:
    shared.fakes.script = lambda generate: f"I look.\n{PARIS}\n{NOW}"
    document, chunks = answers(shared, functions=FUNCTIONS, function_call="auto")
    (choice,) = document["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["content"] == "I look."
    assert "tool_calls" not in choice["message"]
    call = choice["message"]["function_call"]
    assert call == {"name": "get_weather", "arguments": '{"city": "Zürich 🗼"}'}
    parts = deltas(chunks, "function_call")
    assert parts[0] == {"name": "get_weather", "arguments": ""}
    assert "".join(part["arguments"] for part in parts) == call["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [tool["function"] for tool in json.loads(prompt.tools)] == FUNCTIONS


def test_a_function_that_must_be_called(shared: Served) -> None:
    shared.fakes.script = lambda generate: '[{"name": "now", "parameters": {}}]'
    document, _ = answers(shared, functions=FUNCTIONS, function_call={"name": "now"})
    assert document["choices"][0]["message"]["function_call"] == {"name": "now", "arguments": "{}"}
    constraint = shared.fakes.seen.generates[-1].sampling.constraint
    assert constraint is not None
    assert json.loads(constraint.text)["maxItems"] == 1
    shared.fakes.script = lambda generate: NOW
    document, _ = answers(shared, functions=FUNCTIONS, function_call="none")
    assert "function_call" not in document["choices"][0]["message"]


def test_reasoning_can_be_left_out(shared: Served) -> None:
    shared.fakes.script = lambda generate: "<think>\nWhy?\n</think>\n\nSo."
    document, chunks = answers(shared, include_reasoning=False)
    assert document["choices"][0]["message"] == {"role": "assistant", "content": "So.", "refusal": None}
    assert not deltas(chunks, "reasoning_content")
    assert "".join(deltas(chunks, "content")) == "So."


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True}, {"tools": [{"type": "function", "function": FUNCTIONS[1]}]}]
)
def test_token_ids_of_chats(shared: Served, fields: dict[str, Any]) -> None:
    shared.fakes.script = lambda generate: f"<think>\nA\n</think>\n\nB{NOW}"
    document, chunks = answers(shared, return_token_ids=True, **fields)
    assert document["prompt_token_ids"] == list(b"user:hi\nassistant:") == chunks[0]["prompt_token_ids"]
    ids = document["choices"][0]["token_ids"]
    assert len(ids) == document["usage"]["completion_tokens"]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids
    assert sum("prompt_token_ids" in chunk for chunk in chunks) == 1
    if "logprobs" in fields:
        assert len(document["choices"][0]["logprobs"]["content"]) == len(ids)


def test_token_ids_of_completions(shared: Served) -> None:
    document, chunks = answers(shared, TEXT, return_token_ids=True, prompt=["hi", "you"], seed=1)
    for index, prompt in enumerate(("hi", "you")):
        choice = document["choices"][index]
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choice["prompt_token_ids"] == own[0]["prompt_token_ids"] == list(prompt.encode())
        assert [token for each in own for token in each.get("token_ids", ())] == choice["token_ids"]
        assert len(choice["token_ids"]) == 6


def test_tokens_as_ids(shared: Served) -> None:
    fields = {"return_tokens_as_token_ids": True, "return_token_ids": True, "seed": 1, "max_tokens": 6}
    for chat in (True, False):
        document, _ = (
            answers(shared, CHAT, logprobs=True, **fields) if chat else answers(shared, TEXT, logprobs=0, **fields)
        )
        choice = document["choices"][0]
        told = choice["logprobs"]
        tokens = [each["token"] for each in told["content"]] if chat else told["tokens"]
        assert tokens == [token_name(token) for token in choice["token_ids"]]


@pytest.mark.parametrize(("limit", "left"), [(3, "tu!"), (100, "wxyz stu!"), (-1, "wxyz stu!")])
def test_the_end_of_a_prompt(shared: Served, limit: int, left: str) -> None:
    document, _ = answers(shared, TEXT, prompt="wxyz stu!", truncate_prompt_tokens=limit, echo=True, seed=1)
    assert shared.fakes.seen.generates[-1].prompt == packed(left)
    assert document["choices"][0]["text"].startswith(left)
    assert document["usage"]["prompt_tokens"] == len(left)


def test_a_prompt_that_is_cut_to_fit(shared: Served) -> None:
    document, _ = answers(shared, TEXT, prompt="x" * 600, truncate_prompt_tokens=-1, max_tokens=1)
    assert document["usage"]["prompt_tokens"] == 511
    document, _ = answers(shared, messages=[{"role": "user", "content": "x" * 600}], truncate_prompt_tokens=5)
    assert document["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("name", ["rid", "request_id"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_request_by_its_own_name(shared: Served, path: str, name: str) -> None:
    body = {**(ASK if path == CHAT else {"prompt": "hi", "max_tokens": 400}), name: "mine", "stream": True}
    shared.fakes.script = lambda generate: "word " * 70
    with shared.client.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert shared.client.post("/abort_request", json={"rid": "mine"}).status_code == 200
        finishes = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if line.startswith("data: {")]
    assert finishes[-1] == "abort"


def test_a_text_to_fill_in(shared: Served) -> None:
    document, chunks = answers(shared, TEXT, prompt="def f(", suffix="):\n  return x", seed=1)
    generate = shared.fakes.seen.generates[-1]
    assert generate.prompt == packed("<P>def f(<S>):\n  return x<M>")
    assert 77 in generate.sampling.stop_token_ids
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert document["choices"][0]["text"] == text
    document, _ = answers(shared, TEXT, prompt=["a", "b"], suffix="c", seed=1, echo=True, ignore_eos=True)
    assert [choice["text"][0] for choice in document["choices"]] == ["a", "b"]
    assert shared.fakes.seen.generates[-1].sampling.stop_token_ids == []


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, None, 200),
        ({"priority": "nobody"}, None, 400),
        ({"priority": "admin"}, None, 400),
        ({"priority": "admin", "api_key": "a", "admin_api_key": "b"}, "a", 403),
        ({"priority": "admin", "api_key": "a", "admin_api_key": "b"}, "b", 200),
    ],
)
def test_who_may_be_urgent(serve: Serve, settings: dict[str, Any], key: str | None, status: int) -> None:
    served = serve(**settings)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for path, body in ((CHAT, {**ASK, "max_tokens": 1}), (TEXT, {"prompt": "hi"}), ("/generate", {"text": "hi"})):
        for priority, expected in ((None, 200), (0, 200), (3, status), (-3, status)):
            response = served.client.post(path, json={**body, "priority": priority}, headers=headers)
            assert response.status_code == expected, (path, priority, response.text)
        assert served.fakes.seen.generates[-1].priority == (-3 if status == 200 else 0)
