"""Anthropic's client: what it parses, adds up, sends back and raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from ingress.conftest import Served
from ingress.fakes import unpacked
from ingress.test_anthropic import TOOLS
from ingress.test_tools import PARIS, REASONED

from llm_runtime.actors.messages import Generate

ASK: Any = {"model": "fake", "max_tokens": 300, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=30) as each:
        yield each


def test_messages(client: anthropic.Anthropic, served: Served) -> None:
    served.fakes.script = lambda generate: "Hello."
    message = client.messages.create(**ASK)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "Hello."
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 7
    with client.messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == "Hello."
        assert stream.get_final_message().usage == message.usage


def test_calls_and_results(client: anthropic.Anthropic, served: Served) -> None:
    served.fakes.script = lambda generate: REASONED
    with client.messages.stream(**ASK, tools=TOOLS) as stream:
        message = stream.get_final_message()
    thinking, text, weather, now = message.content
    assert thinking.thinking == "Weather first."
    assert text.text == "I look."
    assert weather.input == {"city": "Zürich 🗼"}
    assert now.input == {}
    served.fakes.script = lambda generate: "Sunny."
    results: Any = [{"type": "tool_result", "tool_use_id": each.id, "content": "sun"} for each in (weather, now)]
    answer = client.messages.create(
        **{
            **ASK,
            "messages": [
                *ASK["messages"],
                {"role": "assistant", "content": message.content},
                {"role": "user", "content": results},
            ],
        },
        tools=TOOLS,
    )
    assert answer.content[0].text == "Sunny."


def test_models(client: anthropic.Anthropic) -> None:
    assert [(each.id, each.display_name) for each in client.models.list()] == [("fake", "fake"), ("alias", "alias")]
    assert client.models.retrieve("alias").created_at.year > 2000


def test_count_tokens(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="fake", messages=ASK["messages"]).input_tokens == 18


def test_tool_runner(client: anthropic.Anthropic, served: Served) -> None:
    """It asks for a thread, goes on with it, and sends the whole conversation when there is none."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a place."""
        return f"sunny in {city}"

    def says(generate: Generate) -> str:
        return "Sunny." if "sunny in" in unpacked(generate.prompt) else PARIS

    served.fakes.script = says
    turns = list(client.beta.messages.tool_runner(**ASK, tools=[get_weather]))
    assert [turn.stop_reason for turn in turns] == ["tool_use", "end_turn"]
    assert turns[-1].content[0].text == "Sunny."
    asked: Any = [*ASK["messages"], {"role": "system", "content": "Be brief."}]
    kept = client.beta.messages.thread(**{**ASK, "messages": asked}, tools=[get_weather.to_dict()])
    assert kept.send().content[-1].name == "get_weather"


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**{**ASK, "model": "other"})
    with pytest.raises(anthropic.NotFoundError, match="batches are not supported"):
        client.messages.batches.list()
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as refused:
        client.messages.create(**{**ASK, "max_tokens": 0})
    assert refused.value.request_id
