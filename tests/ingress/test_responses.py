"""Responses as plain HTTP, with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Serve, Served, one_ingress
from .test_anthropic import events_of, prompt_of
from .test_tools import REASONED

URL = "/v1/responses"
TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
    {"type": "function", "name": "now"},
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


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "input": "hi", "max_output_tokens": 300, **fields}


def added(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that a stream ends with, checked against the stream's other events."""
    first, second, *middle, last = events
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert last["type"] == f"response.{last['response']['status']}"
    output: list[dict[str, Any]] = []
    number = 1
    for event in middle:
        kind, grown = event["type"], len(event.get("delta", "x"))
        number += grown
        assert event["sequence_number"] == number
        if kind == "response.output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        assert event["output_index"] == len(output) - 1
        item = output[-1]
        if kind == "response.output_item.done":
            assert {**item, "status": event["item"]["status"]} == event["item"]
            output[-1] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        match kind.removeprefix("response."):
            case "content_part.added":
                item["content"].append(event["part"])
            case "reasoning_text.delta" | "output_text.delta":
                item["content"][0]["text"] += event["delta"]
            case "reasoning_text.done" | "output_text.done":
                assert item["content"][0]["text"] == event["text"]
            case "content_part.done":
                assert item["content"][0] == event["part"]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert item["arguments"] == event["arguments"]
            case _:
                raise AssertionError(kind)
    assert last["sequence_number"] == number + 1
    assert last["response"]["output"] == output
    return last["response"]  # type: ignore[no-any-return]


def says(served: Served, text: str, **fields: Any) -> dict[str, Any]:
    """The answer when the model says something, which must be the same in a stream."""
    served.fakes.script = lambda generate: text
    response = served.client.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    documents = response.json(), added(events_of(served.client.post(URL, json=body(stream=True, **fields)).text))
    for document in documents:
        rid = document.pop("id").removeprefix("resp_")
        document.pop("created_at")
        for item in document["output"]:
            assert rid in item.pop("id")
            if item["type"] == "function_call":
                assert item.pop("call_id").startswith("call_")
    assert documents[0] == documents[1]
    return documents[0]


def test_reasoning_text_and_calls(shared: Served) -> None:
    response = says(shared, REASONED, tools=TOOLS, metadata={"a": "b"}, store=False)
    done = {"status": "completed"}
    text = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    weather = {"name": "get_weather", "arguments": '{"city": "Zürich 🗼"}'}
    assert response["output"] == [
        {"type": "reasoning", **done, "summary": [], "content": [{"type": "reasoning_text", "text": "Weather first."}]},
        {"type": "message", **done, "role": "assistant", "content": [text]},
        {"type": "function_call", **done, **weather},
        {"type": "function_call", **done, "name": "now", "arguments": "{}"},
    ]
    assert response["status"] == "completed"
    assert response["metadata"] == {"a": "b"}
    assert response["tools"] == TOOLS
    assert response["usage"]["total_tokens"] == len("user:hi\nassistant:") + len(REASONED) + 1


def test_an_incomplete_response(shared: Served) -> None:
    response = says(shared, "Hello there.", max_output_tokens=5)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hello"


def test_the_conversation_that_the_template_is_given(shared: Served) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": '{"x": 1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "c"},
    ]
    response = shared.client.post(
        URL,
        json=body(instructions="s", input=items, reasoning={"effort": "low", "summary": "auto"}, max_output_tokens=2),
    )
    assert response.status_code == 200, response.text
    messages, prompt = prompt_of(shared)
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {"x": 1}}}
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "T", "tool_calls": [call]},
        {"role": "tool", "content": "c", "tool_call_id": "call_1"},
    ]
    assert json.loads(prompt.template_arguments) == {"reasoning_effort": "low"}


def test_tool_choices_and_formats(shared: Served) -> None:
    def constraint(**fields: Any) -> dict[str, Any]:
        assert shared.client.post(URL, json=body(max_output_tokens=2, **fields)).status_code == 200
        constraint = shared.fakes.seen.generates[-1].sampling.constraint
        assert constraint is not None
        return json.loads(constraint.text)  # type: ignore[no-any-return]

    forced = constraint(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert len(forced["items"]["anyOf"]) == 2
    assert forced["maxItems"] == 1
    assert len(constraint(tools=TOOLS, tool_choice={"type": "function", "name": "now"})["items"]["anyOf"]) == 1
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert constraint(text={"format": form}) == schema


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"conversation": "c"}, "conversation", "send 'previous_response_id'"),
        ({"store": True}, "store", "response_store_bytes"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "some"}, "truncation", "invalid"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search' is not supported"),
        ({"tool_choice": {"type": "custom", "name": "x"}}, "tool_choice", "'custom' is not supported"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "name"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice", "when tools are given"),
        ({"input": [{"type": "compaction", "id": "x"}]}, "input[0].type", "'compaction' is not supported"),
        ({"input": [{"role": "user"}]}, "input[0]", "content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "image"),
        ({"text": {"format": {"type": "xml"}}}, "response_format", "type"),
        ({"max_output_tokens": 10_000}, "messages", "max_output_tokens is 10000"),
    ],
)
def test_errors(shared: Served, fields: dict[str, Any], param: str, message: str) -> None:
    response = shared.client.post(URL, json=body(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


def test_tools_that_a_server_does_not_run(shared: Served) -> None:
    others = [{"type": kind, "name": "x", "tools": []} for kind in ("custom", "web_search", "namespace", "local_shell")]
    shared.fakes.script = lambda generate: "Hello."
    response = shared.client.post(URL, json=body(tools=[*others, *TOOLS], tool_choice="auto"))
    assert response.status_code == 200, response.text
    _, prompt = prompt_of(shared)
    assert [tool["function"]["name"] for tool in json.loads(prompt.tools)] == ["get_weather", "now"]
    warnings = response.headers.get_list("warning")
    assert [f"tools[{i}]" in warning for i, warning in enumerate(warnings)] == [True] * 4
    response = shared.client.post(URL, json=body(tools=others, tool_choice="auto", stream=True))
    assert len(response.headers.get_list("warning")) == 4
    assert prompt_of(shared)[1].tools == ""


def test_allowed_tools(shared: Served) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
    assert shared.client.post(URL, json=body(max_output_tokens=2, tools=TOOLS, tool_choice=allowed)).status_code == 200
    assert [tool["function"]["name"] for tool in json.loads(prompt_of(shared)[1].tools)] == ["now"]
    response = shared.client.post(
        URL, json=body(max_output_tokens=2, tools=TOOLS, tool_choice={**allowed, "mode": "required"})
    )
    assert response.status_code == 200
    assert shared.fakes.seen.generates[-1].sampling.constraint is not None


def test_items_of_other_servers(shared: Served) -> None:
    items = [
        {"role": "user", "content": "a", "type": None, "id": None},
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
        {"type": "custom_tool_call", "call_id": "1", "name": "patch", "input": "diff"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "ok"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "status": "completed"},
        {"role": "user", "content": [{"type": "input_text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    ]
    shared.client.post(URL, json=body(input=items, max_output_tokens=2, text={"verbosity": "low"}))
    call = {"name": "patch", "arguments": {"input": "diff"}}
    messages, prompt = prompt_of(shared)
    assert messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "b"},
    ]
    assert json.loads(prompt.template_arguments) == {"verbosity": "low"}


def test_truncation(shared: Served) -> None:
    def asked(count: int, **fields: Any) -> Any:
        turns = [
            [{"role": "user", "content": f"{i}" * 90}, {"role": "assistant", "content": "y"}] for i in range(count)
        ]
        items = [{"role": "system", "content": "s"}, *(item for turn in turns for item in turn)]
        items.append({"role": "user", "content": "last"})
        return shared.client.post(URL, json=body(input=items, max_output_tokens=9, **fields))

    assert asked(8, truncation="disabled").json()["error"]["code"] == "context_length_exceeded"
    response = asked(8, truncation="auto")
    assert response.status_code == 200, response.text
    assert response.json()["truncation"] == "auto"
    messages, _ = prompt_of(shared)
    prompt = len(shared.fakes.seen.generates[-1].prompt) // 4
    assert [messages[0]["content"], messages[1]["content"][0], messages[-1]["content"]] == ["s", "4", "last"]
    assert 512 - 9 - 110 < prompt <= 512 - 9
    asked(2, truncation="auto")
    assert len(prompt_of(shared)[0]) == 6
    too_long = shared.client.post(URL, json=body(input="x" * 600, truncation="auto"))
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_an_error_in_a_stream(serve: Serve) -> None:
    served = serve(request_timeout_s=0.5)
    served.fakes.step_s = 0.05
    *events, last = events_of(served.client.post(URL, json=body(stream=True)).text)
    assert last["type"] == "error"
    assert last["code"] == "timeout"
    assert last["sequence_number"] > events[-1]["sequence_number"] > 1
