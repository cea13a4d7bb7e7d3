"""Tools and reasoning of chat requests, as plain HTTP and through the official client, with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from llm_runtime.actors.ingress.openai.tools import Function, NamedTool, Tool, call_id, calls_schema, constrained
from llm_runtime.actors.messages import ChatPrompt, Constraint, Generate, SamplingParams

from .conftest import Serve, Served, chunks_of, one_ingress
from .fakes import answer, unpacked

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🗼"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
REASONED = f"<think>\nWeather first.\n</think>\n\nI look.\n{PARIS}\n{NOW}"


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
    base = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "seed": 5, "max_tokens": 300}
    return {**base, "tools": TOOLS, **fields}


def says(served: Served, text: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of an answer when the model says something, which must be the same in a stream."""
    served.fakes.script = lambda generate: text
    return choices(served, **fields)


def choices(served: Served, **fields: Any) -> list[dict[str, Any]]:
    response = served.client.post("/v1/chat/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    document = response.json()
    streamed = served.client.post("/v1/chat/completions", json=body(stream=True, **fields))
    assert streamed.status_code == 200, streamed.text
    chunks = chunks_of(streamed.text)
    for made, identity in ((document["choices"], document["id"]), (added(chunks), chunks[0]["id"])):
        for choice in made:
            for index, call in enumerate(choice["message"].get("tool_calls", [])):
                assert call.pop("id") == call_id(identity.removeprefix("chatcmpl-"), choice["index"], index)
    assert added(chunks, ids=False) == document["choices"]
    return document["choices"]  # type: ignore[no-any-return]


def added(chunks: list[dict[str, Any]], ids: bool = True) -> list[dict[str, Any]]:
    """The choices that a stream adds up to."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta, index = choice["delta"], choice["index"]
            if index not in whole:
                assert delta == {"role": "assistant", "content": ""}
                whole[index] = {
                    "index": index,
                    "message": {"role": "assistant", "content": "", "refusal": None},
                    "logprobs": None,
                    "finish_reason": None,
                    "matched_stop": None,
                }
            sofar = whole[index]
            message = sofar["message"]
            assert sofar["finish_reason"] is None
            for key in ("content", "reasoning_content"):
                if key in delta:
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    assert call["function"]["arguments"] == ""
                    calls.append({key: call[key] for key in ("id", "type") if ids or key != "id"})
                    calls[-1]["function"] = dict(call["function"])
                else:
                    assert call["index"] == len(calls) - 1
                    assert call.keys() == {"index", "function"}
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            if choice["logprobs"] is not None:
                sofar["logprobs"] = sofar["logprobs"] or {"content": [], "refusal": None}
                sofar["logprobs"]["content"] += choice["logprobs"]["content"]
            if choice["finish_reason"] is not None:
                sofar["finish_reason"], sofar["matched_stop"] = choice["finish_reason"], choice["matched_stop"]
    for choice in whole.values():
        message = choice["message"]
        if not message["content"] and ("tool_calls" in message or "reasoning_content" in message):
            message["content"] = None
    return [whole[index] for index in sorted(whole)]


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [call("get_weather", '{"city": "Zürich 🗼"}'), call("now", "{}")]


def test_calls_and_reasoning(shared: Served) -> None:
    (choice,) = says(shared, REASONED)
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "I look.",
            "refusal": None,
            "reasoning_content": "Weather first.",
            "tool_calls": CALLS,
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
        "matched_stop": 2,
    }


def test_calls_alone_have_no_content(shared: Served) -> None:
    (choice,) = says(shared, f"{PARIS}\n{NOW}\n")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": CALLS}
    (choice,) = says(shared, "<think>Nothing to say.</think>")
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "stop"


def test_no_call(shared: Served) -> None:
    (choice,) = says(shared, "It is <b>sunny</b>.\n")
    assert choice["message"] == {"role": "assistant", "content": "It is <b>sunny</b>.\n", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_what_is_no_call_is_content(shared: Served) -> None:
    for text in ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "<tool_call>what</tool_call>"):
        (choice,) = says(shared, text)
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == "stop"


def test_an_answer_cut_off(shared: Served) -> None:
    (choice,) = says(shared, PARIS, max_tokens=PARIS.index("rich"))
    assert choice["message"]["tool_calls"] == [call("get_weather", '{"city": "Zü"}')]
    assert choice["finish_reason"] == "length"
    (choice,) = says(shared, REASONED, max_tokens=20)
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": REASONED[8:20].rstrip(),
    }


def test_stop_strings(shared: Served) -> None:
    (choice,) = says(shared, f"I look.{PARIS}{NOW} STOP {NOW}", stop=["STOP"])
    assert choice["message"]["tool_calls"] == CALLS
    assert (choice["finish_reason"], choice["matched_stop"]) == ("tool_calls", "STOP")


def test_several_choices(shared: Served) -> None:
    shared.fakes.script = lambda generate: (
        f"Choice {generate.sampling.seed}.\n{PARIS if generate.sampling.seed % 2 else NOW}"
    )
    found = choices(shared, n=3)
    assert [choice["message"]["content"] for choice in found] == ["Choice 5.", "Choice 6.", "Choice 7."]
    names = [choice["message"]["tool_calls"][0]["function"]["name"] for choice in found]
    assert names == ["get_weather", "now", "get_weather"]


def test_logprobs(shared: Served) -> None:
    (choice,) = says(shared, f"<think>a</think>b{NOW}", logprobs=True, top_logprobs=1)
    assert len(choice["logprobs"]["content"]) == len(f"<think>a</think>b{NOW}") + 1
    assert choice["message"]["tool_calls"] == [call("now", "{}")]


def test_one_call_only(shared: Served) -> None:
    (choice,) = says(shared, f"{PARIS}\n{NOW}", parallel_tool_calls=False)
    assert choice["message"]["tool_calls"] == CALLS[:1]


def test_reasoning_left_in_the_content(shared: Served) -> None:
    (choice,) = says(shared, f"<think>a</think>b{NOW}", separate_reasoning=False)
    assert choice["message"]["content"] == "<think>a</think>b"
    assert choice["message"]["tool_calls"] == [call("now", "{}")]


def test_reasoning_at_once(shared: Served) -> None:
    shared.fakes.script = lambda generate: REASONED
    response = shared.client.post("/v1/chat/completions", json=body(stream=True, stream_reasoning=False))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["Weather first."]
    response = shared.client.post("/v1/chat/completions", json=body(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
    assert sum("reasoning_content" in delta for delta in deltas) > 3


def test_without_tools_calls_are_content(shared: Served) -> None:
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        (choice,) = says(shared, f"<think>a</think>{NOW}", **fields)
        assert choice["message"] == {"role": "assistant", "content": NOW, "refusal": None, "reasoning_content": "a"}
        prompt = shared.fakes.seen.tokenizes[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.tools == ""


def test_what_the_template_and_the_engine_are_told(shared: Served) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": [1]}'}},
                {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
                {"id": "call_3", "type": "function", "function": {"name": "now", "arguments": '{"a": '}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
        {"role": "tool", "tool_call_id": "call_2", "name": "now", "content": ""},
    ]
    says(shared, "x", messages=messages, reasoning_effort="low", chat_template_kwargs={"a": 1}, tool_choice="auto")
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.tools) == TOOLS
    assert json.loads(prompt.template_arguments) == {"reasoning_effort": "low", "a": 1}
    assert json.loads(prompt.messages) == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {"a": [1]}}},
                {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": {}}},
                {"id": "call_3", "type": "function", "function": {"name": "now", "arguments": '{"a": '}},
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "name": "now", "tool_call_id": "call_2"},
    ]
    assert not shared.fakes.seen.generates[-1].text.skip_special_tokens
    says(shared, "x", tools=None)
    assert shared.fakes.seen.generates[-1].text.skip_special_tokens
    response = shared.client.post("/tokenize", json={"messages": messages[:1], "tools": TOOLS})
    assert response.status_code == 200
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.tools) == TOOLS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ebnf": 'root ::= "a"'}, "cannot be combined with tools that may be called"),
        ({"tool_choice": {"type": "function", "function": {"name": "then"}}}, "there is no tool named 'then'"),
        ({"tool_choice": "required", "tools": []}, "only allowed when tools are given"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "two of them are named 'now'"),
    ],
)
def test_refusals(shared: Served, fields: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        response = shared.client.post("/v1/chat/completions", json=body(stream=stream, **fields))
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        assert response.json()["error"]["param"] in ("tool_choice", "tools")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_a_forced_call_is_a_constraint_of_the_output(shared: Served, choice: Any) -> None:
    (answer,) = says(shared, '[{"name": "now", "parameters": {}}]', tool_choice=choice)
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    assert answer["finish_reason"] == "tool_calls"
    constraint = shared.fakes.seen.generates[-1].sampling.constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert json.loads(constraint.text)["items"]["anyOf"]


def test_without_parsers_tools_are_only_rendered(serve: Serve) -> None:
    served = serve()
    (choice,) = says(served, REASONED)
    assert choice["message"] == {"role": "assistant", "content": REASONED, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = served.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.tools) == TOOLS
    assert served.fakes.seen.generates[-1].text.skip_special_tokens


def test_deepseeks_templates(serve: Serve) -> None:
    """They want arguments as text, and have no new beginning, and so no `<think>`, after a tool's result."""
    served = serve(tool_call_parser="deepseekv3", reasoning_parser="deepseek-r1")
    calls = [{"function": {"name": "now", "arguments": each}} for each in ('{"a": 1}', "", {"b": 2})]
    says(served, "x", messages=[{"role": "assistant", "content": None, "tool_calls": calls}])
    prompt = served.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    sent = json.loads(prompt.messages)[0]["tool_calls"]
    assert [each["function"]["arguments"] for each in sent] == ['{"a": 1}', "{}", '{"b":2}']
    (choice,) = says(served, "Hm.</think>Noon.")
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Noon.")
    (choice,) = says(served, "Noon.", messages=[{"role": "tool", "content": "12"}])
    assert choice["message"] == {"role": "assistant", "content": "Noon.", "refusal": None}


def test_the_prompt_says_where_the_reasoning_begins(serve: Serve) -> None:
    """Not what the client tells the template: that may do with it as it likes."""
    served = serve(tool_call_parser="qwen25", reasoning_parser="qwen3-thinking")
    (choice,) = says(served, "Plain.", chat_template_kwargs={"enable_thinking": True})
    assert choice["message"] == {"role": "assistant", "content": "Plain.", "refusal": None}
    served.fakes.opening = "<think>\n"
    (choice,) = says(served, "I could use <tool_call> markup. Hmm.\n</think>\nAnswer")
    message = {"role": "assistant", "content": "Answer", "refusal": None}
    assert choice["message"] == {**message, "reasoning_content": "I could use <tool_call> markup. Hmm."}


def test_a_forced_call_that_is_cut_off_is_no_content(shared: Served) -> None:
    begun = '[{"name": "get_weather'
    (choice,) = says(shared, begun, tool_choice="required", max_tokens=len(begun))
    assert choice["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert choice["finish_reason"] == "length"


def test_an_answer_goes_on(shared: Served) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>Well"}]
    (choice,) = says(shared, ", yes.</think>Yes.", messages=messages, continue_final_message=True)
    assert choice["message"]["reasoning_content"] == ", yes."
    assert choice["message"]["content"] == "Yes."


def test_calls_schema() -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}}
    tools = [Tool("function", Function("f", parameters=parameters)), Tool("function", Function("g"))]
    schema = calls_schema(tools, "required", parallel=True)
    assert schema == {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": "f"},
                        "parameters": {"$ref": "#/$defs/tool0"},
                    },
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"name": {"const": "g"}, "parameters": {"type": "object", "properties": {}}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
            ]
        },
        "$defs": {"tool0": {**parameters, "properties": {"a": {"$ref": "#/$defs/tool0/$defs/A"}}}},
    }
    assert parameters["properties"] == {"a": {"$ref": "#/$defs/A"}}
    once = calls_schema(tools, "required", parallel=False)
    named = calls_schema(tools[1:], NamedTool(Function("g")), parallel=True)  # type: ignore[arg-type]
    assert once["maxItems"] == named["maxItems"] == 1


def test_parameters_of_forced_calls_refer_to_themselves() -> None:
    """And to nothing of other tools, or of the list of calls."""
    tree = {"type": "object", "properties": {"$ref": {"type": "array", "items": {"$ref": "#"}}}}
    point = {"definitions": {"A": {"const": {"$ref": "#"}}}, "properties": {"enum": {"$ref": "#/definitions/A"}}}
    other = {"definitions": {"A": {"type": "null"}}, "properties": {"enum": {"$ref": "#/definitions/A"}}}
    parameters: tuple[dict[str, Any], ...] = (tree, point, other)
    tools = [Tool("function", Function(f"f{i}", parameters=each)) for i, each in enumerate(parameters)]
    schema = calls_schema(tools, "required", parallel=True)

    def call(name: str, arguments: Any) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid([{"name": name, "parameters": arguments}])

    assert call("f0", {"$ref": [{"$ref": []}]})
    assert not call("f0", {"$ref": [[{"name": "f0", "parameters": {}}]]})
    assert call("f1", {"enum": {"$ref": "#"}})
    assert not call("f1", {"enum": None})
    assert call("f2", {"enum": None})


def test_what_tools_constrain() -> None:
    tools = [Tool("function", Function("f", strict=True)), Tool("function", Function("g"))]
    free, texts = SamplingParams(9, 0), SamplingParams(9, 0, constraint=Constraint("json"))

    def kind(sampling: SamplingParams, tools: list[Tool], choice: Any) -> tuple[str, str]:
        found = constrained(sampling, tools, choice, parallel=True)
        return found.constraint.kind if found.constraint else "", found.checked.kind if found.checked else ""

    assert kind(free, tools, "required") == kind(texts, tools, "required") == ("json_schema", "")
    assert kind(texts, tools, "auto") == kind(texts, tools, None) == ("structural_tag", "")
    assert kind(texts, [], "none") == ("json", "")
    assert kind(free, tools, "auto") == ("", "json_schema")
    assert kind(free, tools[1:], "auto") == ("", "")


def test_a_call_or_the_text_that_was_asked_for(shared: Served) -> None:
    """Both are constrained, and told apart by how the output begins."""
    for form in ({"type": "json_object"}, {"type": "json_object", "schema": {"type": "object"}}):
        for text in ('{"a": 1}', '{"a": [{"name": "now", "parameters": {}}]}', "[1, 2]"):
            (choice,) = says(shared, text, response_format=form)
            assert choice["message"]["content"] == text
            assert choice["finish_reason"] == "stop"
        (choice,) = says(shared, '[{"name": "now", "parameters": {}}]', response_format=form)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}
        assert shared.fakes.seen.generates[-1].sampling.constraint.kind == "structural_tag"
    says(shared, '[{"name": "now", "parameters": {}}]', response_format=form, tool_choice="required")
    assert json.loads(shared.fakes.seen.generates[-1].sampling.constraint.text)["type"] == "array"


def test_identities_of_calls() -> None:
    identities = {call_id("r", choice, index) for choice in range(3) for index in range(3)}
    assert len(identities) == 9
    assert call_id("r", 0, 0) == call_id("r", 0, 0) != call_id("s", 0, 0)
    assert call_id("r", 0, 0).startswith("call_")
    assert len(call_id("r", 0, 0, short=True)) == 9
    assert call_id("r", 0, 0, short=True).isalnum()


# -- the official client ----------------------------------------------------------------------------------------------


def agent(generate: Generate) -> str:
    """Asks for the time, then for the weather, then answers with what it was told."""
    told = [line.removeprefix("tool:") for line in unpacked(generate.prompt).splitlines() if line.startswith("tool:")]
    if not told:
        return f"<think>I need the time.</think>\n\n{NOW}"
    if len(told) == 1:
        return f"It is {told[0]}.\n{PARIS}"
    return f"At {told[0]}: {told[1]}."


def run_tool(name: str, arguments: str) -> str:
    return f"{name} of {json.loads(arguments)}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_calls(shared: Served, stream: bool) -> None:
    shared.fakes.script = agent
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    seen: list[str] = []
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        for _ in range(5):
            asked: dict[str, Any] = {"model": "fake", "messages": messages, "tools": TOOLS, "max_tokens": 300}
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    for _event in events:
                        pass
                    choice: Any = events.get_final_completion().choices[0]
            else:
                choice = client.chat.completions.create(**asked).choices[0]
            messages.append(choice.message.model_dump())
            if not choice.message.tool_calls:
                break
            assert choice.finish_reason == "tool_calls"
            for each in choice.message.tool_calls:
                seen.append(each.function.name)
                result = run_tool(each.function.name, each.function.arguments)
                messages.append({"role": "tool", "tool_call_id": each.id, "content": result})
    assert seen == ["now", "get_weather"]
    assert choice.finish_reason == "stop"
    assert choice.message.content == "At now of {}: get_weather of {'city': 'Zürich 🗼'}."
    identities = [each["id"] for message in messages for each in message.get("tool_calls") or ()]
    assert len(set(identities)) == 2


def test_a_plain_request_is_as_before(shared: Served) -> None:
    (choice,) = choices(shared, tools=None, max_tokens=8)
    assert choice["message"]["content"] == answer("user:hi\nassistant:", 5, 8)
