"""Ollama's protocol as plain HTTP, with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from actors.messages import ChatPrompt, TextPrompt

from .conftest import Serve, Served, one_ingress
from .fakes import answer, unpacked
from .test_tools import REASONED, TOOLS


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), tool_call_parser="qwen25", reasoning_parser="qwen3") as served:
        served.fakes.per_step = 3
        yield served


@pytest.fixture(autouse=True)
def _no_script(shared: Served) -> Iterator[None]:
    yield
    shared.fakes.script = None


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields}


def added(text: str) -> dict[str, Any]:
    """The document that a stream of lines adds up to."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = lines.pop()
    message = whole.get("message", whole)
    assert not message.get("content", message.get("response"))
    for line in lines:
        assert (line["model"], line["created_at"]) == (whole["model"], whole["created_at"])
        for key, value in line.get("message", line).items():
            if key in ("content", "thinking", "response"):
                message[key] = message.get(key, "") + value
            elif key == "tool_calls":
                message[key] = message.get(key, []) + value
    return whole


def says(served: Served, text: str, path: str = "/api/chat", **fields: Any) -> dict[str, Any]:
    """The answer when the model says something, which must be the same in a stream."""
    served.fakes.script = lambda generate: text
    whole = served.client.post(path, json={**fields, "stream": False})
    assert whole.status_code == 200, whole.text
    streamed = served.client.post(path, json=fields)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    documents = whole.json(), added(streamed.text)
    for document in documents:
        assert document.pop("created_at").endswith("Z")
        for each in document.get("message", {}).get("tool_calls", ()):
            assert each.pop("id").startswith("call_")
    assert documents[0] == documents[1]
    return documents[0]


def test_chat(shared: Served) -> None:
    assert says(shared, REASONED, **body(tools=TOOLS)) == {
        "model": "fake",
        "message": {
            "role": "assistant",
            "content": "I look.",
            "thinking": "Weather first.",
            "tool_calls": [
                {"function": {"index": 0, "name": "get_weather", "arguments": {"city": "Zürich 🗼"}}},
                {"function": {"index": 1, "name": "now", "arguments": {}}},
            ],
        },
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": len("user:hi\nassistant:"),
        "eval_count": len(REASONED) + 1,
    }


def test_generate(shared: Served) -> None:
    whole = says(shared, "<think>\nT\n</think>\n\nHello.", "/api/generate", model="fake:latest", prompt="p", system="s")
    assert whole["response"] == "Hello."
    assert whole["thinking"] == "T"
    assert unpacked(shared.fakes.seen.generates[-1].prompt) == "system:s\nuser:p\nassistant:"
    raw = says(shared, "<think>", "/api/generate", model="fake", prompt="p", raw=True)
    assert raw["response"] == "<think>"
    assert shared.fakes.seen.tokenizes[-1].prompt == TextPrompt("p")


def test_options(shared: Served) -> None:
    options = {"seed": 5, "temperature": 0, "num_predict": 4, "num_ctx": 4096, "repeat_penalty": 1.5, "stop": ["END"]}
    document = shared.client.post("/api/chat", json=body(stream=False, options=options, keep_alive="5m")).json()
    assert document["message"]["content"] == answer("user:hi\nassistant:", 5, 4)
    assert document["done_reason"] == "length"
    generate = shared.fakes.seen.generates[-1]
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 40, 0.9)
    assert sampling.repetition_penalty == 1.5
    assert generate.text.stop == ["END"]
    schema = {"type": "object"}
    for form, kind in (("json", "json"), (schema, "json_schema")):
        shared.client.post("/api/chat", json=body(format=form, stream=False, options={"num_predict": 2}))
        constraint = shared.fakes.seen.generates[-1].sampling.constraint
        assert constraint is not None
        assert constraint.kind == kind


def test_the_conversation_that_the_template_is_given(shared: Served) -> None:
    call = {"function": {"name": "now", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "thinking": "T", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_name": "now"},
    ]
    response = shared.client.post("/api/chat", json=body(messages=messages, think="high", options={"num_predict": 2}))
    assert response.status_code == 200, response.text
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.messages) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "reasoning_content": "T", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "b", "name": "now"},
    ]
    assert json.loads(prompt.template_arguments) == {
        "enable_thinking": True,
        "thinking": True,
        "reasoning_effort": "high",
    }


def test_models(shared: Served) -> None:
    for path in ("/api/tags", "/api/ps"):
        assert [each["name"] for each in shared.client.get(path).json()["models"]] == ["fake", "alias"]
    shown = shared.client.post("/api/show", json={"model": "alias"}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shared.client.get("/api/version").json().keys() == {"version"}


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_nothing_asked_is_answered_at_once(shared: Served, path: str) -> None:
    before = len(shared.fakes.seen.generates)
    # as curl sends it
    plain = {"content-type": "text/plain"}
    response = shared.client.post(path, content=b'{"model":"fake"}', headers=plain)
    assert response.json()["done_reason"] == "load"
    from_a_page = shared.client.post(path, content=b'{"model":"fake"}', headers={**plain, "origin": "http://x"})
    assert from_a_page.status_code == 403
    assert len(shared.fakes.seen.generates) == before


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("chat", body(model="other"), 404, "does not exist"),
        ("chat", body(messages=[{"role": "user", "content": "a", "images": ["x"]}]), 400, "images"),
        ("chat", body(options={"mirostat": 1}), 400, "options.mirostat"),
        ("chat", body(options={"repeat_penalty": 1.1, "repeat_last_n": 64}), 400, "repeat_last_n"),
        ("chat", body(options={"temperature": -1}), 400, "options.temperature"),
        ("chat", body(format="yaml"), 400, "format"),
        ("chat", body(logprobs=True), 400, "logprobs"),
        ("generate", {"model": "fake", "prompt": "a", "context": [1]}, 400, "context"),
        ("generate", {"model": "fake", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("generate", {"model": "fake", "prompt": "a", "raw": True, "system": "b"}, 400, "system"),
        ("show", {"model": "other"}, 404, "does not exist"),
        ("show", {}, 400, "name"),
    ],
)
def test_errors(shared: Served, path: str, fields: dict[str, Any], status: int, message: str) -> None:
    response = shared.client.post(f"/api/{path}", json=fields)
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert message in response.json()["error"]


def test_an_error_in_a_stream(serve: Serve) -> None:
    served = serve(request_timeout_s=0.5)
    served.fakes.step_s = 0.05
    *lines, last = served.client.post("/api/chat", json=body()).text.splitlines()
    assert "longer than 0.5 seconds" in json.loads(last)["error"]
    assert lines
