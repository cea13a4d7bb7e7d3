"""OpenAI's client and its chat completions: answers as models, a loop of tools, retries, and a client that leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from ingress.conftest import Served
from ingress.test_tools import PARIS, TOOLS
from pydantic import BaseModel
from support import eventually

from llm_runtime.actors.messages import ChatPrompt

HI: Any = [{"role": "user", "content": "hi"}]
OF_RESPONSES: Any = [{"type": "function", **each["function"]} for each in TOOLS]


class City(BaseModel):
    name: str
    twins: list[str]


BERN = '{"name": "Bern", "twins": ["Kraków"]}'


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as each:
        yield each


def schema_asked(served: Served) -> Any:
    constraint = served.fakes.seen.generates[-1].sampling.constraint
    assert constraint is not None
    return json.loads(constraint.text)


def test_answers_as_models(client: openai.OpenAI, served: Served) -> None:
    served.fakes.script = lambda generate: BERN
    parsed = client.chat.completions.parse(model="fake", messages=HI, response_format=City).choices[0].message.parsed
    assert parsed == City(name="Bern", twins=["Kraków"])
    assert schema_asked(served)["required"] == ["name", "twins"]
    with client.chat.completions.stream(model="fake", messages=HI, response_format=City) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    assert client.responses.parse(model="fake", input="hi", text_format=City).output_parsed == parsed
    assert schema_asked(served)["required"] == ["name", "twins"]


def test_a_loop_of_two_calls(client: openai.OpenAI, served: Served) -> None:
    """As agents do it: ask, call, tell, until there are no calls."""
    turns = iter([PARIS, PARIS.replace("Zürich", "Bern"), "Sunny in both."])
    served.fakes.script = lambda generate: next(turns)
    conversation: list[Any] = list(HI)
    cities = []
    while True:
        message = client.chat.completions.create(model="fake", messages=conversation, tools=TOOLS).choices[0].message  # type: ignore[arg-type]
        if not message.tool_calls:
            break
        conversation.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            cities.append(json.loads(call.function.arguments)["city"])
            conversation.append({"role": "tool", "tool_call_id": call.id, "content": "sun"})
    assert message.content == "Sunny in both."
    assert cities == ["Zürich 🗼", "Bern 🗼"]
    told = served.fakes.seen.tokenizes[-1].prompt
    assert isinstance(told, ChatPrompt)
    assert [message["role"] for message in json.loads(told.messages)] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]


def test_calls_that_are_forced(client: openai.OpenAI, served: Served) -> None:
    served.fakes.script = lambda generate: '[{"name": "now", "parameters": {}}]'
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        completion = client.chat.completions.create(
            model="fake",
            messages=HI,
            tools=TOOLS,  # type: ignore[arg-type]
            tool_choice=choice,  # type: ignore[arg-type]
        )
        (call,) = completion.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("now", "{}")
    assert schema_asked(served)["maxItems"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retries(served: Served, busy: Callable[[int, int], None], status: int) -> None:
    """The client waits as long as it is told, and asks again."""
    served.fakes.script = lambda generate: "Hello."
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=1, timeout=30) as client:
        busy(status, 1)
        answered = client.chat.completions.with_raw_response.create(model="fake", messages=HI)
        assert answered.parse().choices[0].message.content == "Hello."
        assert answered.retries_taken == 1
        busy(status, 2)
        with pytest.raises(openai.APIStatusError, match="Too busy") as gave_up:
            client.chat.completions.create(model="fake", messages=HI, stream=True)
        assert (gave_up.value.status_code, gave_up.value.response.headers["retry-after"]) == (status, "1")


def test_a_client_that_leaves(client: openai.OpenAI, served: Served) -> None:
    """Its request is aborted in the engine."""
    served.fakes.script = lambda generate: "word " * 2000
    streams: list[Callable[[], openai.Stream[Any]]] = [
        lambda: client.chat.completions.create(model="fake", messages=HI, stream=True),
        lambda: client.responses.create(model="fake", input="hi", stream=True),
    ]
    for start in streams:
        stream = start()
        next(iter(stream))
        rid = served.fakes.seen.generates[-1].rid
        stream.close()
        eventually(lambda rid=rid: rid in served.fakes.seen.aborts, "an abort")
