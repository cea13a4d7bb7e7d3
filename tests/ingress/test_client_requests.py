"""Requests as real programs send them, that other servers answer: shapes of other protocols, and fields left empty."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_runtime.actors.messages import ChatPrompt

from .conftest import Served

CHAT, TEXT, NATIVE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
MESSAGES, OLLAMA = "/v1/messages", "/api/chat"
USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "g", "parameters": PARAMETERS}}
CALL = '[{"name": "f", "parameters": {}}]'


def asked(served: Served, path: str = CHAT, **fields: Any) -> ChatPrompt:
    """What the chat template is given for a request."""
    base: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [USER], "max_tokens": 2},
        RESPONSES: {"input": "hi", "max_output_tokens": 2},
        MESSAGES: {"model": "fake", "messages": [USER], "max_tokens": 2},
        OLLAMA: {"model": "fake", "messages": [USER], "stream": False, "options": {"num_predict": 2}},
    }
    response = served.client.post(path, json={**base[path], **fields})
    assert response.status_code == 200, response.text
    prompt = served.fakes.seen.tokenizes[-1].prompt
    if not isinstance(prompt, ChatPrompt):  # the end of the reasoning is asked for behind it
        prompt = served.fakes.seen.tokenizes[-2].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def refused(served: Served, path: str, body: dict[str, Any]) -> str:
    response = served.client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [USER], "max_tokens": 2, "top_p": 0}),
        (TEXT, {"prompt": "hi", "max_tokens": 2, "top_p": 0.0, "top_k": 40}),
        (NATIVE, {"text": "hi", "sampling_params": {"max_new_tokens": 2, "top_p": 0}}),
        (RESPONSES, {"input": "hi", "max_output_tokens": 2, "top_p": 0}),
        (MESSAGES, {"model": "fake", "messages": [USER], "max_tokens": 2, "top_p": 0}),
        (OLLAMA, {"model": "fake", "messages": [USER], "stream": False, "options": {"num_predict": 2, "top_p": 0}}),
    ],
)
def test_no_probability_at_all_is_the_most_probable_token(shared: Served, path: str, body: dict[str, Any]) -> None:
    assert shared.client.post(path, json=body).status_code == 200
    sampling = shared.fakes.seen.generates[-1].sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "", "max_completion_tokens": "", "seed": "", "top_k": "", "n": ""},
        {"reasoning_effort": "", "verbosity": "", "tool_choice": "", "stop": ""},
        {"logit_bias": [], "chat_template_kwargs": [], "stream_options": []},
        {"tool_choice": {}, "thinking": {}, "reasoning": {}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {"response_format": {"type": "text", "json_schema": None}},
        {"response_format": {"type": "json_object", "schema": None, "json_schema": None, "strict": False}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS, "x": None}}},
        {"cache_prompt": True, "id_slot": -1, "n_probs": 0, "typical_p": 1.0, "mirostat": 0, "mirostat_tau": 5.0},
        {"dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1, "dynatemp_range": 0},
        {"guided_decoding_backend": "outlines", "user": 42, "prompt_cache_options": {"mode": "explicit"}},
    ],
)
def test_fields_that_are_left_empty(shared: Served, fields: dict[str, Any]) -> None:
    asked(shared, **fields)


def test_what_is_wrong_stays_wrong(shared: Served) -> None:
    base = {"messages": [USER], "max_tokens": 2}
    for field, value in (
        *(("top_p", {}), ("stop", {}), ("model", []), ("temperature", False)),
        *(("mirostat", 2), ("typical_p", 0.9), ("dry_multiplier", 0.8), ("tool_choice", {"type": "x"})),
    ):
        assert field in refused(shared, CHAT, {**base, field: value})
    assert "custom" in refused(shared, CHAT, {**base, "tools": [{"type": "custom", "custom": {"name": "x"}}]})


def test_a_byte_order_mark_counts_for_nothing(shared: Served) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"messages": [USER], "max_tokens": 2}).encode()
    assert shared.client.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200


def test_errors_within_objects_name_the_field(shared: Served) -> None:
    body = {"messages": [USER], "logit_bias": {"1": 101}}
    error = shared.client.post(CHAT, json=body).json()["error"]
    assert error["param"] == "logit_bias"
    assert "'logit_bias'" in error["message"]


@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        {"function": FUNCTION},
        {"type": None, "function": FUNCTION},
        {"type": "function", **FUNCTION},
        {"function": {"type": "function", **FUNCTION}},
    ],
)
def test_shapes_of_a_tool(shared: Served, tool: dict[str, Any]) -> None:
    for path in (CHAT, OLLAMA):
        assert json.loads(asked(shared, path, tools=[tool]).tools) == [TOOL]
    if tool.get("type"):
        assert json.loads(asked(shared, RESPONSES, tools=[tool]).tools) == [TOOL]


def test_a_strict_tool_says_so_in_either_place(shared: Served) -> None:
    for tool in ({**TOOL, "strict": True}, {"type": "function", "function": {**FUNCTION, "strict": True}}):
        asked(shared, tools=[tool])
        assert shared.fakes.seen.generates[-1].sampling.checked is not None


ALLOWED = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("choice", "names", "forced"),
    [
        ({"type": "auto"}, ["f", "g"], False),
        ({"type": "none"}, [], False),
        ({"type": "required"}, ["f", "g"], True),
        ({"type": "any"}, ["f", "g"], True),
        ({"type": "function", "name": "g"}, ["g"], True),
        ({"type": "allowed_tools", "allowed_tools": ALLOWED}, ["f"], True),
        ({"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "auto"}}, ["f"], False),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "g"}]}},
            ["g"],
            False,
        ),
    ],
)
def test_shapes_of_a_choice(shared: Served, choice: dict[str, Any], names: list[str], forced: bool) -> None:
    tools = json.loads(asked(shared, tools=[TOOL, OTHER], tool_choice=choice).tools or "[]")
    assert [tool["function"]["name"] for tool in tools] == names
    assert (shared.fakes.seen.generates[-1].sampling.constraint is not None) == forced


def test_choices_of_responses(shared: Served) -> None:
    for choice in ({"type": "auto"}, {}, {"type": "function", "function": {"name": "f"}}):
        asked(shared, RESPONSES, tools=[TOOL], tool_choice=choice)
    assert shared.fakes.seen.generates[-1].sampling.constraint is not None


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": False}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"exclude": False}}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "enable_thinking": True}, True),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False, "thinking": False}}, False),
    ],
)
def test_switches_of_thinking(shared: Served, fields: dict[str, Any], thinks: bool | None) -> None:
    told = json.loads(asked(shared, **fields).template_arguments)
    assert (told.get("enable_thinking"), told.get("thinking")) == (thinks, thinks)


def test_effort_of_other_names(shared: Served) -> None:
    told = json.loads(asked(shared, reasoning={"effort": "high", "summary": "auto"}).template_arguments)
    assert told == {"reasoning_effort": "high"}
    told = json.loads(asked(shared, RESPONSES, reasoning={"effort": "none"}).template_arguments)
    assert told == {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
    for budget in ({"reasoning": {"max_tokens": 9}}, {"thinking": {"type": "enabled", "budget_tokens": 9}}):
        assert "budget" in refused(shared, CHAT, {"messages": [USER], "max_tokens": 2, **budget})


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]},
            {"role": "assistant", "content": "x", "reasoning_content": "t"},
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "t"}, {"type": "reference"}]},
                    {"type": "redacted_thinking", "data": "?"},
                ],
            },
            {"role": "assistant", "content": "", "reasoning_content": "t"},
        ),
        (
            {"role": "assistant", "content": [{"type": "reasoning", "reasoning": "t", "index": 0}]},
            {"role": "assistant", "content": "", "reasoning_content": "t"},
        ),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}]},
            {"role": "assistant", "content": "x"},
        ),
        ({"role": "user", "content": [{"type": "input_text", "text": "x"}, "y"]}, {"role": "user", "content": "x y"}),
        (
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "x", "id": "a", "index": 1, "extras": {"a": 1}}],
            },
            {"role": "assistant", "content": "x"},
        ),
        (
            {"role": "assistant", "content": "x", "id": "msg_1", "extra_content": {"google": {"thought": True}}},
            {"role": "assistant", "content": "x"},
        ),
    ],
)
def test_messages_of_other_clients(shared: Served, message: dict[str, Any], plain: dict[str, Any]) -> None:
    assert json.loads(asked(shared, messages=[message, USER]).messages) == [plain, USER]


def test_thinking_is_of_the_assistant(shared: Served) -> None:
    message = {"role": "user", "content": [{"type": "thinking", "thinking": "t"}]}
    assert "thinking" in refused(shared, CHAT, {"messages": [message], "max_tokens": 2})


def test_items_of_tools_that_are_not_run_here(shared: Served) -> None:
    """A conversation that Codex has begun with OpenAI."""
    items = [
        {"type": "reasoning", "id": "r", "content": [{"type": "text", "text": "t"}], "format": "unknown"},
        {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "local_shell_call", "call_id": "1", "action": {"type": "exec", "command": ["ls"]}, "status": None},
        {"type": "local_shell_call_output", "id": "1", "output": "a.py"},
        {"type": "shell_call", "call_id": "2", "action": {"commands": ["ls"]}, "status": "completed"},
        {"type": "shell_call_output", "call_id": "2", "output": [{"stdout": "b.py", "stderr": ""}]},
        {"type": "mcp_list_tools", "id": "m", "server_label": "x", "tools": []},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": {"a": "b"}},
        {"type": "function_call_output", "call_id": "3", "output": None, "name": "f"},
        {"type": "message", "role": "assistant", "content": None},
        USER,
    ]
    response = shared.client.post(RESPONSES, json={"input": items, "max_output_tokens": 2})
    assert response.status_code == 200, response.text
    assert "web_search_call" in response.headers["warning"]
    assert "mcp_list_tools" in response.headers["warning"]
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    calls = [
        {"name": "local_shell", "arguments": {"type": "exec", "command": ["ls"]}},
        {"name": "shell", "arguments": {"commands": ["ls"]}},
        {"name": "f", "arguments": {"a": "b"}},
    ]
    first, one, second, two, third, three, empty, user = json.loads(prompt.messages)
    assert first["reasoning_content"] == "t"
    for turn, call, identity in zip((first, second, third), calls, "123", strict=True):
        assert turn["tool_calls"] == [{"id": identity, "type": "function", "function": call}]
    assert [each["content"] for each in (one, two, three)] == ["a.py", '[{"stdout":"b.py","stderr":""}]', ""]
    assert (empty, user) == ({"role": "assistant", "content": ""}, USER)


def test_fields_of_responses(shared: Served) -> None:
    tool = {"type": "function", "name": "f", "defer_loading": True, "allowed_callers": ["direct"], "output_schema": {}}
    asked(shared, RESPONSES, tools=[tool], previous_response_id="", conversation={}, metadata=[], text={}, reasoning={})
    asked(shared, RESPONSES, presence_penalty=0.5, frequency_penalty=0.0, top_k=7, min_p=0.1, seed=5, stop=["x"])
    generate = shared.fakes.seen.generates[-1]
    assert (generate.sampling.presence_penalty, generate.sampling.top_k, generate.sampling.seed) == (0.5, 7, 5)
    assert generate.text.stop == ["x"]
    compaction = [{"type": "compaction", "compact_threshold": 200_000}]
    response = shared.client.post(RESPONSES, json={"input": "hi", "context_management": compaction})
    assert response.status_code == 200
    assert "context_management" in response.headers["warning"]
    for nothing in ({}, {"input": []}):
        assert "input" in refused(shared, RESPONSES, nothing)


def test_ollama_messages_of_older_clients(shared: Served) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "name": "f"},
        USER,
    ]
    prompt = asked(shared, OLLAMA, messages=messages, tool_choice="auto", think="")
    turn, result, _ = json.loads(prompt.messages)
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]
    assert result == {"role": "tool", "content": "r", "name": "f"}


def test_calls_that_come_back_to_anthropic(shared: Served) -> None:
    for sent in (None, "", []):
        call = {"type": "tool_use", "id": "1", "name": "f", "input": sent, "provider_specific_fields": {"a": 1}}
        messages = [
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}]},
        ]
        turn, _ = json.loads(asked(shared, MESSAGES, messages=messages).messages)
        assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_sglangs_names_of_tokenizing(shared: Served) -> None:
    tokens = shared.client.post("/v1/tokenize", json={"prompt": "hi"}).json()["tokens"]
    assert shared.client.post("/v1/detokenize", json={"tokens": tokens}).json()["prompt"] == "hi"


@pytest.mark.parametrize("kind", [{}, [], {"a": 1}, 7, None])
def test_types_that_are_no_text(shared: Served, kind: Any) -> None:
    """They are told from each other by their type, which may be anything."""
    chat = {"messages": [{"role": "user", "content": [{"type": kind, "text": "x"}]}], "max_tokens": 2}
    assert "messages[0].content[0]" in refused(shared, CHAT, chat)
    if kind is not None and kind != [] and kind != {}:
        for field in ("response_format", "structured_outputs"):
            refused(shared, CHAT, {"messages": [USER], "max_tokens": 2, field: {"type": kind}})
    refused(shared, CHAT, {"messages": [USER], "max_tokens": 2, "structured_outputs": {"type": kind}})
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": kind}]}
    refused(shared, RESPONSES, {"input": "hi", "tools": [TOOL], "tool_choice": allowed})
