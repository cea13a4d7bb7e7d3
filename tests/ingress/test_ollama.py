"""Ollama's protocol as plain HTTP, with a scripted model."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from llm_runtime.actors.checkpoint import CheckpointFacts
from llm_runtime.actors.messages import ChatPrompt, TextPrompt

from .conftest import Serve, Served, one_ingress
from .fakes import MAX_MODEL_LEN, answer, unpacked
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


def test_options_that_are_nothing_here(shared: Served) -> None:
    options = {"seed": None, "num_predict": 2.0, "num_ctx": 4096.0, "mirostat": None, "stop": None, "top_k": 7.0}
    response = shared.client.post("/api/chat", json=body(stream=False, options=options, keep_alive=-1, think=None))
    assert response.json()["eval_count"] == 2
    assert "warning" not in response.headers
    assert shared.fakes.seen.generates[-1].sampling.top_k == 7
    options = {"num_predict": 2, "mirostat": 2, "unheard": 1, "repeat_penalty": 1.1, "repeat_last_n": 64}
    for stream in (False, True):
        response = shared.client.post("/api/chat", json=body(stream=stream, options=options))
        assert response.status_code == 200
        warnings = " ".join(response.headers.get_list("warning"))
        assert all(name in warnings for name in ("options.mirostat", "options.unheard", "options.repeat_last_n"))


def test_logprobs(shared: Served) -> None:
    fields = body(logprobs=True, top_logprobs=1, options={"num_predict": 4, "seed": 3})
    whole = shared.client.post("/api/chat", json={**fields, "stream": False}).json()
    lines = [json.loads(line) for line in shared.client.post("/api/chat", json=fields).text.splitlines()]
    streamed = [each for line in lines for each in line.get("logprobs", ())]
    assert streamed == whole["logprobs"]
    assert len(streamed) == 4
    assert streamed[0].keys() == {"token", "logprob", "bytes", "top_logprobs"}
    assert len(streamed[0]["top_logprobs"]) == 1
    assert "logprobs" not in shared.client.post("/api/chat", json={**fields, "logprobs": False, "stream": False}).json()


def test_the_context_of_an_answer_goes_on(shared: Served) -> None:
    ask = {"model": "fake", "prompt": "p", "options": {"num_predict": 3, "seed": 1}, "stream": False}
    first = shared.client.post("/api/generate", json=ask).json()
    prompt = list(b"user:p\nassistant:")
    assert first["context"][: len(prompt)] == prompt
    assert len(first["context"]) == len(prompt) + 3
    second = shared.client.post("/api/generate", json={**ask, "prompt": "q", "context": first["context"]}).json()
    sent = list(array("i", shared.fakes.seen.generates[-1].prompt))
    assert sent == first["context"] + list(b"user:q\nassistant:")
    assert second["context"][: len(sent)] == sent
    assert second["prompt_eval_count"] == len(sent)
    assert "context" not in shared.client.post("/api/generate", json={**ask, "raw": True}).json()


def test_what_is_filled_in(shared: Served) -> None:
    for stream in (False, True):
        ask = {"model": "fake", "prompt": "p", "suffix": "s", "options": {"num_predict": 3, "seed": 1}}
        response = shared.client.post("/api/generate", json={**ask, "stream": stream})
        assert response.status_code == 200, response.text
        generate = shared.fakes.seen.generates[-1]
        assert unpacked(generate.prompt) == "<P>p<S>s<M>"
        assert 77 in generate.sampling.stop_token_ids


def test_pull(shared: Served) -> None:
    lines = shared.client.post("/api/pull", json={"model": "fake:latest"}).text.splitlines()
    assert json.loads(lines[-1]) == {"status": "success"}
    assert shared.client.post("/api/pull", json={"name": "fake", "stream": False}).json() == {"status": "success"}
    for method, what in (("POST", "create"), ("POST", "copy"), ("DELETE", "delete")):
        refused = shared.client.request(method, f"/api/{what}", json={"model": "fake"})
        assert (refused.status_code, "when it starts" in refused.json()["error"]) == (404, True)


def test_what_is_known_of_a_model(serve: Serve) -> None:
    facts = CheckpointFacts(
        "gguf", "llama", 134_515_008, "Q4_1", 98_000_000, 1_700_000_000, "ab" * 32, {"llama.block_count": 30}
    )
    client = serve(files=msgspec.to_builtins(facts)).client
    card = client.get("/api/tags").json()["models"][0]
    assert card == {
        "name": "fake",
        "model": "fake",
        "modified_at": "2023-11-14T22:13:20Z",
        "size": 98_000_000,
        "digest": "ab" * 32,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "134.52M",
            "quantization_level": "Q4_1",
        },
    }
    loaded = client.get("/api/ps").json()["models"][0]
    assert loaded.keys() - card.keys() == {"expires_at", "context_length", "size_vram"}
    shown = client.post("/api/show", json={"model": "fake"}).json()
    assert shown["details"] == card["details"]
    assert shown["template"] == "{{ messages }}"
    assert shown["model_info"]["llama.block_count"] == 30
    assert shown["model_info"]["llama.context_length"] == MAX_MODEL_LEN
    assert "num_ctx" in shown["parameters"]


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
        ("chat", body(options={"temperature": -1}), 400, "options.temperature"),
        ("chat", body(format="yaml"), 400, "format"),
        ("chat", body(options={"num_predict": 2.5}), 400, "options.num_predict"),
        ("chat", body(options=[1]), 400, "options"),
        ("chat", body(keep_aliv=1), 400, "Did you mean 'keep_alive'"),
        ("generate", {"model": "fake", "prompt": "a", "context": [10**6]}, 400, "context"),
        ("generate", {"model": "fake", "prompt": "a", "context": [1], "raw": True}, 400, "context"),
        ("pull", {"model": "other"}, 404, "does not exist"),
        ("pull", {}, 400, "name"),
        ("embed", {"model": "fake", "input": "a"}, 400, "generates text"),
        ("generate", {"model": "fake", "prompt": "a", "suffix": "b", "system": "c"}, 400, "system"),
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
