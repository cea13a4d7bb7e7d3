"""Requests that must be refused, each with a clear error in OpenAI's shape, and without an engine being troubled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Served

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
USER = {"role": "user", "content": "hi"}

Case = tuple[str, bytes, int, str]
"""Path, body, expected status, and what the error's message or param must contain."""


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hi", **fields}).encode()


def native(**params: Any) -> bytes:
    return json.dumps({"text": "hi", "sampling_params": params}).encode()


BIASES = {str(i): 1 for i in range(1025)}
# Wrong values of the fields that both OpenAI endpoints have.
COMMON: dict[str, list[Any]] = {
    "model": [1, [], {}, True],
    "temperature": [-0.1, 2.01, -1e-9, "hot", [], True, 1e300],
    "top_p": [-0.5, 1.01, "x", {}],
    "top_k": [-2, 1.5, "x", 2**31, 2**70, True],
    "min_p": [-0.1, 1.1, "x"],
    "seed": [1.5, 1e300, "x", 2**63, -(2**63) - 1, 10**30, True],
    "stop": [1, {}, [1], [None], [""], ["a", ""], ["x"] * 65, "x" * 1025],
    "stop_token_ids": [[-1], [1000], [2**40], ["a"], "a", 7, [1.5], [0] * 1025],
    "max_tokens": [-2, 1.5, 1e30, "x", 2**31, 10**30, 512, 513, True],
    "min_tokens": [-1, 513, 1.5, "x", 2**40],
    "n": [0, -1, 129, 1.5, "x", 2**40],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "presence_penalty": [-2.1, 2.1, "x", []],
    "repetition_penalty": [0, -1, 2.5, "x"],
    "logit_bias": [
        "x",
        {"a": 1},
        {"1": 101},
        {"1": -101},
        {"1": "x"},
        {"1000": 1},
        {"-1": 1},
        {"1": None},
        {str(i): 1 for i in range(1025)},
    ],
    "ignore_eos": ["x", 1],
    "skip_special_tokens": ["x", 0],
    "no_stop_trim": [1],
    "include_stop_str_in_output": ["yes"],
    "spaces_between_special_tokens": [False],
    "priority": [1.5, 2**31, -(2**31) - 1, "high"],
    "extra_key": [1, "x" * 1025, {}],
    "cache_salt": [[]],
    "stream": [1, "true", {}],
    "stream_options": [{"include_usage": True}, 1, {"what": 1}],
    "parallel_tool_calls": ["x"],
    "tools": [{"a": 1}, "x", [1], [{}], [{"type": "web_search"}], [{"type": "function"}]],
    "tool_choice": ["required", {"type": "function"}, "some", 1],
    "functions": [[{}], "x"],
    "function_call": [{"name": "f"}, "required"],
    "response_format": [
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema"},
        {"type": "json_schema", "schema": 7},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": 7}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "foo": 1}},
        {"type": "structural_tag"},
        {"type": "json_object", "schema": 7},
        {"type": "xml"},
        "text",
        {},
    ],
    "modalities": [["text", "audio"], ["audio"], "text"],
    "audio": [{"voice": "alloy"}],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{"user_location": {}}],
    "reasoning_effort": ["lots", 1],
    "verbosity": ["loud"],
    "regex": [1, "", {}, "x" * 65_537],
    "json_schema": ["{", 7, [], "7"],
    "ebnf": [1],
    "structural_tag": ["x", {}, [], "7"],
    "structured_outputs": [{}, "x", {"xml": "x"}, {"json": {}, "regex": "a"}, {"json_object": 1}],
    "guided_json": [7, "{"],
    "guided_regex": [7],
    "guided_choice": ["x", [], [1], [""]],
    "guided_grammar": [{}],
    "lora_path": ["x"],
    "foo": [1, 0, "x", [0], {"a": None}, True],
    "max_token": [5],
    "Temperature": [1],
    "best_of": [2],
    "use_beam_search": [True],
    "length_penalty": [0.5],
    "allowed_token_ids": [[1]],
    "bad_words": [["x"]],
    "prompt_logprobs": [0, 1],
    "truncate_prompt_tokens": [-2, "x", 0],
    "return_token_ids": [1],
    "rid": [1, "x" * 1025],
    "chat_template": ["{{ 7 * 7 }}"],
}
CHAT_ONLY: dict[str, list[Any]] = {
    "max_completion_tokens": [0, -2, 512, 2**31, "x"],
    "logprobs": [1, "x", 5],
    "top_logprobs": [-1, 21, "x", 1],
    "chat_template_kwargs": ["x", 1],
    "add_generation_prompt": ["x"],
    "continue_final_message": [True, 1],
    "tools": [
        [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        [{"type": "function", "function": {"name": "f", "foo": 1}}],
        [{"type": "function", "function": {"name": "f"}}] * 2,
        [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1025)],
    ],
    "separate_reasoning": ["x", 1],
    "stream_reasoning": ["x"],
    "thinking_budget": [-1, 1.5, "x", True, 2**31, 5],  # the last one because the model has no format of reasoning
    "thinking_token_budget": [-1, "x", 0],
    "custom_params": [{"a": 1}, 1, {"thinking_budget": -1}, {"thinking_budget": 5}],
    "custom_logit_processor": ["x"],
    "prompt": ["x"],
    "echo": [True],
    "documents": ["x", [1]],
    "include_reasoning": ["x"],
}
TEXT_ONLY: dict[str, list[Any]] = {
    "prompt": [None, [], [[]], "", [""], 1, {}, [1, "a"], [[1], 2], [[1], "a"], [-1], [1000], [[5, 1000]], [1.5]],
    "logprobs": [-1, 21, True, 1.5],
    "echo": ["x", 1],
    "best_of": [2, "x"],
    "suffix": [1, ["x"]],
    "functions": [[{"name": "f"}]],
    "documents": [[{"text": "x"}]],
    "thinking_budget": [5],
    "messages": [[USER]],
    "add_special_tokens": ["x"],
}
NATIVE_PARAMS: dict[str, list[Any]] = {
    "max_new_tokens": [-2, 1.5, "x", 512, 2**40],
    "temperature": [-1, 1e7, "x"],
    "top_p": [-1, 1.1],
    "top_k": [-2, 0.5],
    "min_p": [2],
    "sampling_seed": ["x", 2**64],
    "stop": [[1], [""], ["x"] * 65],
    "stop_token_ids": [[1000], "x"],
    "n": [0, 129],
    "frequency_penalty": [3],
    "repetition_penalty": [0],
    "logit_bias": [{"1000": 1}],
    "regex": [1, ""],
    "json_schema": ["{", 7],
    "ebnf": [{}],
    "structural_tag": ["x", {}],
    "custom_params": [{"a": 1}, {"thinking_budget": "x"}, {"thinking_budget": 5, "a": 1}, {"thinking_budget": 5}],
    "spaces_between_special_tokens": [False],
    "min_new_tokens": [513, -1],
    "foo": [1],
}
LONG_PROMPTS: list[Any] = ["x" * 512, list(range(513)), [[1], []], ["a"] * 1025, [None], [2**70]]
MESSAGES: list[Any] = [
    [],
    None,
    "hi",
    {},
    [1],
    ["hi"],
    [{}],
    [{"role": "user"}],
    [{"content": "hi"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": {"text": "x"}}],
    [{"role": "wizard", "content": "hi"}],
    [{"role": "", "content": "hi"}],
    [{"role": 1, "content": "hi"}],
    [{"role": "user", "content": None, "refusal": None}],
    [{"role": "tool", "content": "hi", "tool_call_id": 1}],
    [{"role": "user", "content": "hi", "tool_call_id": "1"}],
    [{"role": "user", "content": "hi", "reasoning_content": "x"}],
    [{"role": "user", "content": "hi", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "function": {"name": 1}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 1}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}, "foo": 1}]}],
    [{"role": "assistant", "content": "x", "reasoning_content": 1}],
    [{"role": "user", "content": "hi", "reasoning": "x"}],
    [{"role": "user", "content": "hi", "function_call": {"name": "f"}}],
    [{"role": "assistant", "content": "hi", "function_call": {"arguments": "{}"}}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    [{"role": "assistant", "content": "x", "refusal": 1}],
    [{"role": "assistant", "content": "x", "audio": {"id": "1"}}],
    [{"role": "user", "content": "hi", "name": 5}],
    [{"role": "user", "content": "hi", "foo": 5}],
    [{"role": "user", "content": [7]}],
    [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": 1}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    [{"role": "user", "content": [{"type": "file", "file": {}}]}],
    [USER, {"role": "user", "content": "x" * 600}],
]
NOT_JSON: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"}",
    b"[]",
    b"null",
    b"1",
    b'"prompt"',
    b"hello",
    b"{'prompt': 'hi'}",
    b'{"prompt": "hi",}',
    b'{"prompt": "hi"} x',
    b'{"prompt": "hi"',
    b'{prompt: "hi"}',
    b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "hi"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\ud800abcdef"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "a\x00b"}',
    b'{"prompt": "\\x41"}',
    b'{"prompt": "hi", "temperature": NaN}',
    b'{"prompt": "hi", "temperature": Infinity}',
    b'{"prompt": "hi", "temperature": -Infinity}',
    b'{"prompt": "hi", "temperature": 1e999}',
    b'{"prompt": "hi", "temperature": -1e999}',
    b'{"prompt": "hi", "temperature": .5}',
    b'{"prompt": "hi", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "hi", "max_tokens": -' + b"9" * 5000 + b"}",
    b'{"prompt": "hi", "max_tokens": 1e400}',
    b'{"prompt": "hi", "metadata": ' + b"9" * 5000 + b"}",
    b'{"prompt": "hi", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "hi", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"}",
    b'{"prompt": "hi", "model": "fake", "model": 1}',
    b'{"prompt": "hi", "\\ud800": 1}',
    b'{"prompt": "hi", "\xff": 1}',
    b"\x00" * 100,
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
]


def cases() -> list[Case]:
    table: list[Case] = []
    for fields, path, make in (
        (COMMON, CHAT, chat),
        (CHAT_ONLY, CHAT, chat),
        (COMMON, TEXT, text),
        (TEXT_ONLY, TEXT, text),
        (NATIVE_PARAMS, NATIVE, native),
    ):
        for name, values in fields.items():
            for value in values:
                # A stream option alone is wrong because nothing is streamed; the rest of them by their own fault.
                table.append((path, make(**{name: value}), 400, name))
    table += [(CHAT, chat(messages=messages), 400, "message") for messages in MESSAGES]
    table += [(TEXT, body, 400, "") for body in NOT_JSON]
    table += [
        (CHAT, b"{}", 400, "messages"),
        (TEXT, b"{}", 400, "prompt"),
        (NATIVE, b"{}", 400, "text"),
        (NATIVE, b'{"text": "a", "input_ids": [1]}', 400, "text"),
        (NATIVE, b'{"text": []}', 400, "text"),
        (NATIVE, b'{"input_ids": []}', 400, "input_ids"),
        (NATIVE, b'{"input_ids": [1, [2]]}', 400, "input_ids"),
        (NATIVE, b'{"input_ids": [1000]}', 400, "token ids"),
        (NATIVE, b'{"text": ["a", "b"], "rid": "x"}', 400, "rid"),
        (NATIVE, b'{"text": "a", "image_data": "x"}', 400, "image_data"),
        (NATIVE, b'{"text": "a", "lora_path": "x"}', 400, "lora_path"),
        (NATIVE, b'{"text": "a", "session_params": {"id": 1}}', 400, "session_params"),
        (NATIVE, b'{"text": "a", "return_hidden_states": true}', 400, "return_hidden_states"),
        (NATIVE, b'{"text": "a", "top_logprobs_num": 129}', 400, "top_logprobs_num"),
        (NATIVE, b'{"text": "a", "foo": 1}', 400, "foo"),
        (CHAT, chat(model="other"), 404, "model"),
        (TEXT, text(model="other"), 404, "model"),
        (TEXT, text(model=""), 404, "model"),
        *((TEXT, text(prompt=prompt), 400, "prompt") for prompt in LONG_PROMPTS),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (TEXT, text(max_tokens=4, min_tokens=5), 400, "min_tokens"),
        (TEXT, text(prompt=["a"] * 100, n=100), 400, "answers"),
        (TEXT, text(prompt=[1, 2], suffix="x"), 400, "prompt"),
        (TEXT, text(suffix="x", echo=True, logprobs=1), 400, "echo"),
        (TEXT, text(prompt=["a"] * 8, n=128, logit_bias={str(i): 1 for i in range(999)}), 400, "answers"),
        (TEXT, text(prompt=["a"] * 8, n=128, stop=["x" * 1024] * 64, regex="x" * 60_000), 400, "answers"),
        (TEXT, text(extra_key="a", cache_salt="b"), 400, "cache_salt"),
        (CHAT, chat(messages=[USER], continue_final_message=True, add_generation_prompt=True), 400, "continue_final"),
    ]
    return table


TABLE = cases()


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 300


@pytest.mark.parametrize("part", range(8))
def test_bad_input(shared: Served, part: int) -> None:
    """One request for each case, on one connection, so that a broken connection shows too."""
    generates = len(shared.fakes.seen.generates)
    for path, body, status, hint in TABLE[part::8]:
        response = shared.client.post(path, content=body, headers={"content-type": "application/json"})
        what = f"{path} {body[:120]!r} → {response.status_code} {response.text[:300]}"
        assert response.status_code == status, what
        assert response.headers["content-type"] == "application/json", what
        document = response.json()
        assert set(document) == {"error"}, what
        error = document["error"]
        assert set(error) == {"message", "type", "param", "code"}, what
        assert error["type"] == "invalid_request_error", what
        assert hint in f"{error['message']} {error['param']}", what
        assert len(error["message"]) > 10, what
        assert "Traceback" not in response.text, what
    assert len(shared.fakes.seen.generates) == generates
    assert shared.client.post(TEXT, content=text(), headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_content_type(shared: Served, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = shared.client.post(TEXT, content=text(), headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_accepted_spellings_of_json(shared: Served) -> None:
    for body in (b'{"prompt": "a", "prompt": "b"}', b' \n{"prompt":"\\u00e9\\ud83d\\ude00"}\n', text(temperature=1)):
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert shared.client.post(TEXT, content=body, headers=headers).status_code == 200


def test_context_length_errors_have_their_code(shared: Served) -> None:
    for fields in ({"max_tokens": 511}, {"prompt": "x" * 512, "max_tokens": None}, {"min_tokens": 600}):
        response = shared.client.post(TEXT, json={"prompt": "hi", **fields})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert shared.client.post(TEXT, json={"prompt": "hi", "max_tokens": 510}).status_code == 200
    assert shared.client.post(TEXT, json={"prompt": "x" * 511}).status_code == 200
    full = shared.client.post(TEXT, json={"prompt": "x" * 512, "max_tokens": 0, "echo": True})
    assert full.json()["choices"][0]["text"] == "x" * 512


def test_what_is_repeated_to_the_client_is_bounded(shared: Served) -> None:
    """An id comes back in every event of a stream, a name in the sentence that says it is unknown."""
    long = "x" * 200_000
    body = {"text": "a", "rid": long, "sampling_params": {"max_new_tokens": 2}, "stream": True}
    assert shared.client.post("/generate", json=body).status_code == 400
    assert shared.client.post("/generate", json={**body, "text": ["a"], "rid": [long]}).status_code == 400
    for path, document in (
        ("/v1/completions", {"prompt": "a", "model": long}),
        ("/v1/completions", {"prompt": "a", long: 1}),
        ("/v1/messages", {"model": long, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
        ("/api/chat", {"model": long, "messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": long, "content": "a"}]}),
    ):
        response = shared.client.post(path, json=document)
        assert response.status_code in (400, 404)
        assert len(response.content) < 10_000
    assert len(shared.client.get("/v1/models/" + "x" * 60_000).content) < 10_000
