"""Ollama's client: what it parses, sends back and raises."""

from __future__ import annotations

from typing import Any

import ollama
import pytest
from ingress.conftest import Served
from ingress.test_tools import REASONED, TOOLS

ASK: Any = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def client(served: Served) -> ollama.Client:
    return ollama.Client(host=served.url, timeout=30)


def test_chat(client: ollama.Client, served: Served) -> None:
    served.fakes.script = lambda generate: REASONED
    answer = client.chat(**ASK, tools=TOOLS, think=True, options={"seed": 1}, keep_alive="1m")
    assert answer.message.thinking == "Weather first."
    assert answer.message.content == "I look."
    calls = answer.message.tool_calls
    assert calls is not None
    assert [(each.function.name, each.function.arguments) for each in calls] == [
        ("get_weather", {"city": "Zürich 🗼"}),
        ("now", {}),
    ]
    parts = list(client.chat(**ASK, tools=TOOLS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "I look."
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == answer.eval_count
    served.fakes.script = lambda generate: "Sunny."
    results = [{"role": "tool", "tool_name": each.function.name, "content": "sun"} for each in calls]
    again = client.chat("fake", [*ASK["messages"], answer.message, *results], tools=TOOLS)
    assert again.message.content == "Sunny."


def test_generate_goes_on(client: ollama.Client) -> None:
    first = client.generate("fake", "p", options={"num_predict": 2, "mirostat": 1}, logprobs=True, top_logprobs=2)
    assert first.context
    assert len(first.logprobs or ()) == 2
    assert client.generate("fake", "q", context=list(first.context), options={"num_predict": 2}).prompt_eval_count == 36


def test_generate(client: ollama.Client, served: Served) -> None:
    served.fakes.script = lambda generate: '{"a": 1}'
    answer = client.generate("fake", "p", format="json", system="s")
    assert answer.response == '{"a": 1}'
    assert "".join(part.response for part in client.generate("fake", "p", stream=True)) == '{"a": 1}'


def test_models(client: ollama.Client) -> None:
    assert [each.model for each in client.list().models] == ["fake", "alias"]
    assert [each.model for each in client.ps().models] == ["fake", "alias"]
    shown = client.show("fake")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template
    assert client.pull("fake").status == "success"
    assert [each.status for each in client.pull("fake", stream=True)][-1] == "success"
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        client.pull("other")
    with pytest.raises(ollama.ResponseError, match="generates text"):
        client.embed("fake", "a")


def test_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        client.chat("other", ASK["messages"])
    assert missing.value.status_code == 404
