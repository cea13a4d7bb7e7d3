"""langchain-anthropic and langchain-ollama against a node."""

from __future__ import annotations

import os
from typing import Any, Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaLLM
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


ASK = [SystemMessage("You are a geographer."), HumanMessage("What is the capital of France?")]


def conversation(chat: Any, **choice: Any) -> None:
    """Text, a stream, a call and its result."""
    assert "Paris" in chat.invoke(ASK).text
    assert "Paris" in "".join(part.text for part in chat.stream(ASK))
    called = chat.bind_tools([get_weather], **choice).invoke(ASK)
    for call in called.tool_calls:
        result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
        assert chat.bind_tools([get_weather]).invoke([*ASK, called, result]) is not None
    assert called.tool_calls or not choice


def main() -> None:
    url, model = os.environ["NODE_URL"], os.environ["NODE_MODEL"]
    anthropic = ChatAnthropic(  # type: ignore[call-arg]
        model=model, base_url=url, api_key="none", temperature=0, max_tokens=60, timeout=120, max_retries=0
    )
    conversation(anthropic, tool_choice="get_weather")
    assert anthropic.get_num_tokens_from_messages(ASK) > 0
    assert isinstance(anthropic.with_structured_output(City, method="json_schema").invoke(ASK), City)
    ollama = ChatOllama(model=model, base_url=url, temperature=0, num_predict=60, num_ctx=4096, mirostat=0)
    conversation(ollama)
    assert isinstance(ollama.with_structured_output(City, method="json_schema").invoke(ASK), City)
    assert OllamaLLM(model=model, base_url=url, temperature=0, num_predict=20).invoke("The capital of France is")


if __name__ == "__main__":
    main()
