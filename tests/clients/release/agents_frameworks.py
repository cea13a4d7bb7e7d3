"""Agents' frameworks: a loop with a tool, a stream, and an answer as a model."""

import asyncio
import os
from typing import Any

from pydantic import BaseModel

MODEL, BASE = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]
QUESTION = "What is the weather in Paris?"


class City(BaseModel):
    city: str
    degrees: int


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


def langchain() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI

    for responses in (False, True):
        llm = ChatOpenAI(model=MODEL, use_responses_api=responses)
        assert "sunny" in str(llm.invoke("hi").text)
        assert "sunny" in "".join(str(part.text) for part in llm.stream("hi"))
        bound = llm.bind_tools([tool(get_weather)])
        history: list[Any] = [HumanMessage(QUESTION)]
        history.append(bound.invoke(history))
        (call,) = history[-1].tool_calls
        history.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
        assert "sunny" in str(bound.invoke(history).text)
        for method in ("json_schema", "function_calling"):
            assert isinstance(llm.with_structured_output(City, method=method).invoke("hi"), City), method
    assert "sunny" in OpenAI(model=MODEL).invoke("hi")


def langgraph() -> None:
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    agent = create_react_agent(ChatOpenAI(model=MODEL), [get_weather])
    assert "sunny" in agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1].content


def openai_agents() -> None:
    import agents
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    client = AsyncOpenAI()
    for make in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        model = make(model=MODEL, openai_client=client)
        agent = agents.Agent("a", model=model, instructions="Help.", tools=[agents.function_tool(get_weather)])
        result = agents.Runner.run_sync(agent, QUESTION)
        assert "sunny" in result.final_output
        more = agents.Runner.run_sync(agent, [*result.to_input_list(), {"role": "user", "content": "Thanks."}])
        assert more.final_output

        async def streamed(agent: Any = agent) -> str:
            run = agents.Runner.run_streamed(agent, QUESTION)
            async for _ in run.stream_events():
                pass
            return str(run.final_output)

        assert "sunny" in asyncio.run(streamed())
        typed = agents.Agent("b", model=make(model=MODEL, openai_client=AsyncOpenAI()), output_type=City)
        assert isinstance(agents.Runner.run_sync(typed, "hi").final_output, City)
        client = AsyncOpenAI()
    model = agents.OpenAIResponsesModel(model=MODEL, openai_client=AsyncOpenAI())
    agent = agents.Agent("c", model=model, tools=[agents.function_tool(get_weather), agents.WebSearchTool()])
    first = agents.Runner.run_sync(agent, QUESTION)
    model = agents.OpenAIResponsesModel(model=MODEL, openai_client=AsyncOpenAI())
    agent = agents.Agent("c", model=model)
    assert agents.Runner.run_sync(agent, "And now?", previous_response_id=first.last_response_id).final_output


def pydantic_ai() -> None:
    from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

    for make in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(make(MODEL), system_prompt="Help.", tools=[get_weather])
        result = agent.run_sync(QUESTION)
        assert "sunny" in result.output
        assert agent.run_sync("Thanks.", message_history=result.all_messages()).output
        for output in (NativeOutput(City), ToolOutput(City)):
            assert isinstance(Agent(make(MODEL), output_type=output).run_sync("hi").output, City), output
        assert isinstance(Agent(make(MODEL), output_type=PromptedOutput(City)).run_sync("hi").output, City)


def smolagents() -> None:
    from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool

    model = OpenAIServerModel(model_id=MODEL, api_base=BASE, api_key="none")
    weather = tool(get_weather)
    assert "sunny" in str(CodeAgent(tools=[weather], model=model, max_steps=3, verbosity_level=0).run("Say sunny."))
    agent = ToolCallingAgent(tools=[weather], model=model, max_steps=2, verbosity_level=0)
    assert agent.run(QUESTION) is not None


def instructor() -> None:
    import instructor as library
    from openai import OpenAI

    names = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "PARALLEL_TOOLS", "FUNCTIONS")
    modes = [getattr(library.Mode, name) for name in names if hasattr(library.Mode, name)]
    for mode in modes:
        client = library.from_openai(OpenAI(), mode=mode)
        wanted: Any = City
        if mode is library.Mode.PARALLEL_TOOLS:
            from collections.abc import Iterable

            wanted = Iterable[City]
        found = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "The weather?"}], response_model=wanted, max_retries=0
        )
        first = next(iter(found)) if mode is library.Mode.PARALLEL_TOOLS else found
        assert isinstance(first, City), mode
    for mode in (library.Mode.RESPONSES_TOOLS,):
        client = library.from_openai(OpenAI(), mode=mode)
        found = client.responses.create(model=MODEL, input="The weather?", response_model=City, max_retries=0)
        assert isinstance(found, City), mode


def litellm() -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as library

    ask = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": "none"}
    answer = library.completion(**ask, messages=[{"role": "user", "content": "hi"}], reasoning_effort="low")
    history = [{"role": "user", "content": "hi"}, answer.choices[0].message.model_dump()]
    again = [*history, {"role": "user", "content": "and?"}]
    assert "sunny" in library.completion(**ask, messages=again).choices[0].message.content
    first = library.responses(**ask, input="hi")
    assert library.responses(**ask, input="more", previous_response_id=first.id).output


if __name__ == "__main__":
    failed = []
    for client in (langchain, langgraph, openai_agents, pydantic_ai, smolagents, instructor, litellm):
        try:
            client()
        except Exception as error:
            failed.append(client.__name__)
            print(f"{client.__name__}: {type(error).__name__}: {str(error)[:1500]}")
        else:
            print(f"{client.__name__}: ok")
    raise SystemExit(", ".join(failed) or 0)
