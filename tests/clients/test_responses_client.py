"""OpenAI's client and its responses: what it parses, adds up, sends back and raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from ingress.conftest import Served
from ingress.test_responses import TOOLS
from ingress.test_tools import REASONED


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as each:
        yield each


def test_text(client: openai.OpenAI, served: Served) -> None:
    served.fakes.script = lambda generate: "Hello."
    response = client.responses.create(model="fake", input="hi", instructions="s")
    assert response.output_text == "Hello."
    assert response.usage is not None
    assert response.usage.output_tokens == 7
    events = client.responses.create(model="fake", input="hi", stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello."


def test_calls_and_results(client: openai.OpenAI, served: Served) -> None:
    served.fakes.script = lambda generate: REASONED
    tools: Any = TOOLS
    with client.responses.stream(model="fake", input="hi", tools=tools) as stream:
        kinds = {event.type for event in stream}
        response = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = [item for item in response.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather", "now"]
    served.fakes.script = lambda generate: "Sunny."
    items: Any = [
        {"role": "user", "content": "hi"},
        *(item.model_dump() for item in response.output),
        *({"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls),
    ]
    assert client.responses.create(model="fake", input=items, tools=tools).output_text == "Sunny."
    items[1:5] = response.output
    assert client.responses.create(model="fake", input=items, tools=tools).output_text == "Sunny."


def test_a_conversation_that_the_server_keeps(client: openai.OpenAI, served: Served) -> None:
    served.fakes.script = lambda generate: "Hello."
    first = client.responses.create(model="fake", input="hi")
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(model="fake", input="and?", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == ["message", "message", "message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(model="fake", input="more", previous_response_id=second.id, store=False)
    assert third.previous_response_id == second.id


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="whole conversation") as wrong:
        client.responses.create(model="fake", input="hi", previous_response_id="resp_1")
    assert wrong.value.param == "previous_response_id"
