"""The clients against a node that serves the embedded model: nothing is changed but the base URL."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pytest
from ingress.test_anthropic import TOOLS as ANTHROPIC_TOOLS
from ingress.test_tools import TOOLS
from pydantic import BaseModel, Field
from support import eventually

MODEL = "smollm2-135m-instruct"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "Paris"


class Review(BaseModel):
    """What applications ask for."""

    mood: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)
    words: list[Literal["tasty", "bland", "cheap"]] = Field(max_length=3)


@pytest.fixture
def client(node: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node}/v1", api_key="none", timeout=60) as each:
        yield each


def test_openai(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0).choices[0].message.content
    assert PARIS in (whole or "")
    stream = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == whole
    assert PARIS in client.responses.create(model=MODEL, input=FRANCE[0]["content"], temperature=0).output_text


def test_openai_answers_as_models(client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "Review: the soup was cold. As JSON."}]
    parsed = client.chat.completions.parse(model=MODEL, messages=ask, response_format=Review, temperature=1.0)
    assert isinstance(parsed.choices[0].message.parsed, Review)
    response = client.responses.parse(model=MODEL, input=ask, text_format=Review, temperature=1.0)
    assert isinstance(response.output_parsed, Review)


def test_openai_loop_of_two_calls(client: openai.OpenAI) -> None:
    """A grammar makes the model call."""
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
    conversation: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "get_weather"}}, "none"]
    for choice in choices:
        message = (
            client.chat.completions.create(
                model=MODEL,
                messages=conversation,
                tools=tools,
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=60,
                temperature=0,
                extra_body={"min_tokens": 4},  # with nothing to say, this model says nothing
            )
            .choices[0]
            .message
        )
        conversation.append(message)
        for call in message.tool_calls or []:
            assert call.type == "function"
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
            conversation.append({"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'})
    assert len(conversation) == 6
    assert message.content


def test_openai_errors_and_leaving(client: openai.OpenAI, node: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt="word " * 9000)
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: httpx.get(f"{node}/get_load").json()[0]["num_reqs"] == 0, "an engine without requests")


def test_anthropic(node: str) -> None:
    with anthropic.Anthropic(base_url=node, api_key="none", timeout=60) as client:
        ask: Any = {"model": MODEL, "max_tokens": 60, "messages": FRANCE, "extra_body": {"temperature": 0}}
        with client.messages.stream(**ask) as stream:
            assert PARIS in "".join(stream.text_stream)
            final = stream.get_final_message()
        assert final.usage.output_tokens == client.messages.create(**ask).usage.output_tokens
        conversation = list(FRANCE)
        for _ in range(2):
            calls = client.messages.create(
                **{**ask, "messages": conversation}, tools=ANTHROPIC_TOOLS, tool_choice={"type": "tool", "name": "now"}
            )
            (call,) = calls.content
            assert call.type == "tool_use"
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
            conversation += [{"role": "assistant", "content": calls.content}, {"role": "user", "content": [result]}]
        answer = client.messages.create(
            **{**ask, "messages": conversation}, tools=ANTHROPIC_TOOLS, tool_choice={"type": "none"}
        )
        assert answer.content[0].type == "text"


def test_ollama(node: str) -> None:
    client = ollama.Client(host=node, timeout=60)
    greedy = {"temperature": 0, "num_predict": 60}
    whole = client.chat(MODEL, FRANCE, options=greedy).message.content or ""
    assert PARIS in whole
    stream = client.chat(MODEL, FRANCE, options=greedy, stream=True)
    assert "".join(part.message.content or "" for part in stream) == whole
    answer = client.chat(MODEL, FRANCE, format=Review.model_json_schema(), options={"temperature": 1.0})
    Review.model_validate_json(answer.message.content or "")
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        client.chat("nobody", FRANCE)


def test_litellm(node: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    litellm = pytest.importorskip("litellm")
    ask = {"api_base": f"{node}/v1", "api_key": "none", "messages": FRANCE, "max_tokens": 60, "timeout": 60}
    ask["model"] = f"openai/{MODEL}"
    assert PARIS in litellm.completion(**ask, temperature=0).choices[0].message.content
    parts = litellm.completion(**ask, temperature=0, stream=True)
    assert PARIS in "".join(part.choices[0].delta.content or "" for part in parts)
    answer = litellm.completion(**ask, response_format=Review, temperature=1.0)
    Review.model_validate_json(answer.choices[0].message.content)
    named = {"type": "function", "function": {"name": "now"}}
    (call,) = litellm.completion(**ask, tools=TOOLS, tool_choice=named).choices[0].message.tool_calls
    assert call.function.name == "now"
