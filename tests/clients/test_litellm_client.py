"""litellm, which many applications speak to all providers through: as OpenAI's, Anthropic's and Ollama's server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from ingress.conftest import Served
from ingress.test_tools import PARIS, REASONED, TOOLS
from pydantic import BaseModel
from support import eventually

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a list when it is imported
litellm = pytest.importorskip("litellm")

HI: Any = [{"role": "user", "content": "hi"}]


class City(BaseModel):
    name: str
    population: int


def asked(served: Served, provider: str = "openai", **fields: Any) -> dict[str, Any]:
    base = f"{served.url}/v1" if provider == "openai" else served.url
    return {"model": f"{provider}/fake", "api_base": base, "api_key": "none", "messages": HI, "timeout": 30, **fields}


@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama_chat"])
def test_chat(served: Served, provider: str) -> None:
    served.fakes.script = lambda generate: "Hello."
    answer = litellm.completion(**asked(served, provider, max_tokens=50))
    assert answer.choices[0].message.content == "Hello."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 7
    parts = list(litellm.completion(**asked(served, provider, stream=True, max_tokens=50)))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello."


def test_asynchronous(served: Served) -> None:
    served.fakes.script = lambda generate: "Hello."

    async def texts() -> str:
        stream = await litellm.acompletion(**asked(served, stream=True))
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    assert asyncio.run(texts()) == "Hello."


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_tools_and_reasoning(served: Served, provider: str) -> None:
    served.fakes.script = lambda generate: REASONED
    message = litellm.completion(**asked(served, provider, tools=TOOLS, max_tokens=300)).choices[0].message
    assert message.reasoning_content == "Weather first."
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "now"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls]
    served.fakes.script = lambda generate: PARIS
    again = asked(served, provider, messages=[*HI, message.model_dump(), *results], tools=TOOLS, max_tokens=300)
    (call,) = litellm.completion(**again).choices[0].message.tool_calls
    more = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    served.fakes.script = lambda generate: "Sunny."
    again["messages"] += [{"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}, more]
    assert litellm.completion(**again).choices[0].message.content == "Sunny."


@pytest.mark.parametrize("provider", ["openai", "ollama_chat"])
def test_an_answer_as_a_model(served: Served, provider: str) -> None:
    served.fakes.script = lambda generate: '{"name": "Bern", "population": 134000}'
    answer = litellm.completion(**asked(served, provider, response_format=City))
    assert City.model_validate_json(answer.choices[0].message.content).name == "Bern"
    constraint = served.fakes.seen.generates[-1].sampling.constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"


def test_responses(served: Served) -> None:
    served.fakes.script = lambda generate: "Hello."
    base = f"{served.url}/v1"
    response = litellm.responses(model="openai/fake", input="hi", api_base=base, api_key="none", timeout=30)
    assert response.output[-1].content[0].text == "Hello."


def test_errors_and_retries(served: Served, busy: Callable[[int, int], None]) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**asked(served, model="openai/other"))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked(served, temperature=9))
    served.fakes.script = lambda generate: "Hello."
    busy(429, 1)
    with pytest.raises(litellm.RateLimitError, match="Too busy"):
        litellm.completion(**asked(served, max_retries=0))
    busy(503, 1)
    assert litellm.completion(**asked(served, max_retries=2)).choices[0].message.content == "Hello."


def test_a_client_that_leaves(served: Served) -> None:
    served.fakes.script = lambda generate: "word " * 2000

    async def leave() -> str:
        stream = await litellm.acompletion(**asked(served, stream=True))
        await anext(stream)
        rid = served.fakes.seen.generates[-1].rid
        await stream.aclose()
        return rid

    rid = asyncio.run(leave())
    eventually(lambda: rid in served.fakes.seen.aborts, "an abort")
