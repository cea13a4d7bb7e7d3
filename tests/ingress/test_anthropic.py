"""Anthropic's messages as plain HTTP, with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llm_runtime.actors.messages import ChatPrompt, Generate, Refused

from .conftest import Serve, Served, one_ingress
from .fakes import MAX_MODEL_LEN, answer
from .test_tools import PARIS, REASONED

TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather of a place.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
URL = "/v1/messages"


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
    base = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
    return {**base, **fields}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, each named as its document says."""
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def added(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream adds up to."""
    start, ping, *middle, delta, stop = events
    assert [start["type"], ping["type"], delta["type"], stop["type"]] == [
        *("message_start", "ping", "message_delta", "message_stop")
    ]
    message: dict[str, Any] = start["message"]
    assert message["content"] == []
    assert message["usage"]["output_tokens"] == 0
    partial, opened = "", False
    for event in middle:
        if event["type"] == "content_block_start":
            assert not opened
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            partial, opened = "", True
            continue
        assert opened
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            opened = False
            if block["type"] == "tool_use":
                assert block["input"] == {}
                block["input"] = json.loads(partial)
            continue
        match event["delta"]:
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "input_json_delta", "partial_json": text}:
                partial += text
    assert not opened
    message |= delta["delta"]
    message["usage"] = delta["usage"]
    return message


def says(served: Served, text: str, **fields: Any) -> dict[str, Any]:
    """The answer when the model says something, which must be the same in a stream."""
    served.fakes.script = lambda generate: text
    response = served.client.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    streamed = served.client.post(URL, json=body(stream=True, **fields))
    documents = response.json(), added(events_of(streamed.text))
    for document in documents:
        rid = document.pop("id").removeprefix("msg_")
        assert rid
        for block in document["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("call_")
    assert documents[0] == documents[1]
    return documents[0]


def prompt_of(served: Served) -> tuple[list[dict[str, Any]], ChatPrompt]:
    """The last conversation that the tokenizer was given."""
    prompt = served.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return json.loads(prompt.messages), prompt


def test_thinking_text_and_calls(shared: Served) -> None:
    message = says(shared, REASONED, tools=TOOLS)
    assert message["content"] == [
        {"type": "thinking", "thinking": "Weather first.", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Zürich 🗼"}},
        {"type": "tool_use", "name": "now", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"] == {
        "input_tokens": len("user:hi\nassistant:") - 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 1,
        "output_tokens": len(REASONED) + 1,
    }


def test_stop_reasons(shared: Served) -> None:
    assert says(shared, "Hello.")["stop_reason"] == "end_turn"
    stopped = says(shared, "Hello END there", stop_sequences=["END"])
    assert stopped["stop_reason"] == "stop_sequence"
    assert stopped["stop_sequence"] == "END"
    assert stopped["content"] == [{"type": "text", "text": "Hello "}]
    assert says(shared, "Hello.", max_tokens=3)["stop_reason"] == "max_tokens"


def test_a_limit_beyond_the_context_is_lowered(shared: Served) -> None:
    message = shared.client.post(URL, json=body(max_tokens=100_000)).json()
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == MAX_MODEL_LEN - len("user:hi\nassistant:")


def test_the_conversation_that_the_template_is_given(shared: Served) -> None:
    response = shared.client.post(
        URL,
        json=body(
            max_tokens=2,
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            tools=TOOLS,
            thinking={"type": "disabled"},
            messages=[
                {"role": "user", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "T", "signature": ""},
                        {"type": "text", "text": "c"},
                        {"type": "tool_use", "id": "call_1", "name": "now", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "call_1", "content": "none", "is_error": True},
                        {"type": "text", "text": "d"},
                    ],
                },
            ],
        ),
    )
    assert response.status_code == 200, response.text
    messages, prompt = prompt_of(shared)
    function = {"name": "now", "arguments": {"x": 1}}
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a b"},
        {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "T",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Error: none", "tool_call_id": "call_1"},
        {"role": "user", "content": "d"},
    ]
    assert json.loads(prompt.template_arguments) == {"enable_thinking": False, "thinking": False}
    names = [tool["function"]["name"] for tool in json.loads(prompt.tools)]
    assert names == ["get_weather", "now"]


def test_an_assistant_at_the_end_is_continued(shared: Served) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
    assert says(shared, " here", messages=messages)["content"] == [{"type": "text", "text": " here"}]
    assert prompt_of(shared)[1].continue_final_message


def test_tool_choices_and_formats(shared: Served) -> None:
    def constraint(**fields: Any) -> dict[str, Any]:
        assert shared.client.post(URL, json=body(max_tokens=2, **fields)).status_code == 200
        constraint = shared.fakes.seen.generates[-1].sampling.constraint
        assert constraint is not None
        return json.loads(constraint.text)  # type: ignore[no-any-return]

    forced = constraint(tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert forced["maxItems"] == 1
    assert len(forced["items"]["anyOf"]) == 2
    assert len(constraint(tools=TOOLS, tool_choice={"type": "tool", "name": "now"})["items"]["anyOf"]) == 1
    schema = {"type": "object"}
    assert constraint(output_config={"format": {"type": "json_schema", "schema": schema}}) == schema


def test_count_tokens(shared: Served) -> None:
    response = shared.client.post(f"{URL}/count_tokens", json={"model": "fake", "messages": body()["messages"]})
    assert response.json() == {"input_tokens": len("user:hi\nassistant:")}


SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"temperature": 1.5}, 400, "temperature"),
        ({"unheard": 1}, 400, "unheard"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "'image' is not supported"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, 400, "role"),
        ({"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, 400, "'web_search'"),
        ({"tools": [SEARCH], "tool_choice": {"type": "any"}}, 400, "Anthropic runs"),
        ({"compaction": {"type": "summarize"}}, 400, "'compaction' is not supported"),
        ({"container": "c"}, 400, "'container' is not supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, 400, "name"),
    ],
)
def test_errors(shared: Served, fields: dict[str, Any], status: int, message: str) -> None:
    response = shared.client.post(URL, json=body(**fields))
    assert response.status_code == status
    document = response.json()
    assert document["type"] == "error"
    assert document["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert message in document["error"]["message"]


def test_refused_by_the_engine(shared: Served) -> None:
    def full(generate: Generate) -> Refused:
        return Refused(generate.rid, generate.attempt, 429, "The queue is full.", 1.0)

    shared.fakes.refuse = full
    try:
        response = shared.client.post(URL, json=body())
    finally:
        shared.fakes.refuse = lambda generate: None
    assert response.status_code == 429
    assert response.json()["error"] == {"type": "rate_limit_error", "message": "The queue is full."}


def test_keys_and_an_error_in_a_stream(serve: Serve) -> None:
    served = serve(api_key="secret", request_timeout_s=0.5)
    served.fakes.step_s = 0.05
    refused = served.client.post(URL, json=body())
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"
    streamed = served.client.post(URL, json=body(stream=True), headers={"x-api-key": "secret"})
    events = events_of(streamed.text)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "timeout_error"
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    seed = served.fakes.seen.generates[-1].sampling.seed
    assert text
    assert answer("user:hi\nassistant:", seed, 300).startswith(text)


def test_a_truncated_call_is_closed(shared: Served) -> None:
    shared.fakes.script = lambda generate: PARIS
    message = shared.client.post(URL, json=body(tools=TOOLS, max_tokens=62)).json()
    assert message["content"][-1]["input"] == {"city": "Zür"}  # and says that it is not whole:
    assert message["stop_reason"] == "max_tokens"
