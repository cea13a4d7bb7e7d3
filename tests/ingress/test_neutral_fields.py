"""Fields that ask for nothing, numbers as clients write them, and messages that they send back."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.decoding import converted, decoded
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.messages import ChatPrompt

from .conftest import Served

CHAT, TEXT, NATIVE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
USER = {"role": "user", "content": "hi"}
NOTHING: list[Any] = [None, False, "", [], {}]


class Inner(Struct, forbid_unknown_fields=True):
    number: int = 0


class Tagged(Struct, tag="a", forbid_unknown_fields=True):
    number: int


class Other(Struct, tag="b", forbid_unknown_fields=True):
    text: str = ""


class Body(Struct, forbid_unknown_fields=True):
    neutral = {"best_of": (1,)}
    unsupported = ("audio",)

    number: int | None = None
    small: Annotated[int, Meta(ge=0, le=9)] = 1
    fraction: float | int = 0.5
    flag: bool = True
    name: str = "x"
    inner: Inner | None = None
    many: list[Inner] | str = []
    parts: list[Tagged | Other] = []
    bias: dict[int, int] = {}
    mode: Literal["a", "b"] | Inner = "a"


DECODER = msgspec.json.Decoder(Body)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        *(({"foo": nothing}, {}) for nothing in NOTHING),
        *(({"audio": nothing, "inner": {"foo": nothing}}, {"inner": {}}) for nothing in NOTHING),
        ({"number": 6.0, "small": 9.0, "fraction": 6.0}, {"number": 6, "small": 9, "fraction": 6.0}),
        ({"number": None, "small": None, "flag": None, "name": None, "many": None}, {}),
        ({"best_of": 1, "many": [{"number": 2.0, "foo": None}]}, {"many": [{"number": 2}]}),
        ({"parts": [{"type": "a", "number": -3.0, "x": []}, {"type": "b", "text": None}]}, None),
        ({"bias": {"7": 1.0}, "mode": {"number": 1.0, "x": False}}, {"bias": {"7": 1}, "mode": {"number": 1}}),
    ],
)
def test_what_asks_for_nothing_is_left_out(sent: Any, meant: Any) -> None:
    found = decoded(msgspec.json.encode(sent), DECODER)
    if meant is None:
        assert found.parts == [Tagged(-3), Other()]
    else:
        assert found == DECODER.decode(msgspec.json.encode(meant))
        assert converted(sent, Body, "body") == found


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        ({"foo": 0}, "foo", "Unrecognized request argument supplied: foo"),
        ({"smal": 3}, "smal", "Did you mean 'small'?"),
        ({"inner": {"Number": 3}}, "inner.Number", "Did you mean 'number'?"),
        ({"many": [{}, {"foo": 1}]}, "many[1].foo", "many[1].foo"),
        ({"audio": {"a": 1}}, "audio", "'audio' is not supported"),
        ({"best_of": 2}, "best_of", "best_of"),
        ({"number": 6.5}, "number", "expected `int | null`, got `float`"),
        ({"number": 1e300}, "number", "expected `int | null`"),
        ({"small": 10.0}, "small", "<= 9"),
        ({"number": "6"}, "number", "got `str`"),
        ({"flag": 1}, "flag", "expected `bool`"),
        ({"parts": [{"type": "c"}]}, "parts[0].type", "invalid value"),
        ({"parts": [{"type": "a", "number": None}]}, "parts[0].number", "expected `int`"),
    ],
)
def test_what_asks_for_something_is_refused_by_name(sent: Any, param: str, message: str) -> None:
    for attempt in (lambda: decoded(msgspec.json.encode(sent), DECODER), lambda: converted(sent, Body, "body")):
        with pytest.raises(ApiError) as caught:
            attempt()
        assert (caught.value.param or "").removeprefix("body.") == param
        assert message in caught.value.message.replace("body.", "")


def bodies() -> list[tuple[str, dict[str, Any]]]:
    chat, text = {"messages": [USER], "max_tokens": 2}, {"prompt": "hi", "max_tokens": 2}
    response = {"input": "hi", "max_output_tokens": 2}
    neutral: list[dict[str, Any]] = [
        *({"foo": nothing, "audio": nothing, "lora_path": nothing} for nothing in NOTHING),
        {
            "best_of": 1,
            "use_beam_search": False,
            "length_penalty": 1.0,
            "include_reasoning": True,
            "early_stopping": False,
        },
        {"max_tokens": 2.0, "seed": 1.0, "top_k": 4.0, "min_tokens": 1.0, "n": 1.0, "logit_bias": {"7": 5.0}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "functions": None, "function_call": None},
        {"tools": None, "tool_choice": "none", "stop_token_ids": [3.0], "priority": 0.0},
        {"bad_words": [], "allowed_token_ids": None, "prompt_logprobs": None, "documents": [], "chat_template": None},
        {"stream_options": None, "stop": None, "temperature": None, "skip_special_tokens": None, "user": None},
        {"stream_options": {}, "modalities": [], "top_logprobs": None},
        {"stream_options": {"include_usage": False}, "metadata": {}, "documents": []},
        {"rid": "a", "request_id": "b", "truncate_prompt_tokens": None, "stream": None, "add_generation_prompt": None},
    ]
    cases = [(path, {**base, **fields}) for fields in neutral for path, base in ((CHAT, chat), (TEXT, text))]
    cases += [
        (CHAT, {**chat, "logprobs": False, "top_logprobs": 0}),
        (CHAT, {**chat, "echo": False, "separate_reasoning": None, "continue_final_message": None}),
        (CHAT, {**chat, "messages": [{**USER, "cache_control": {"type": "ephemeral"}, "name": None}]}),
        (TEXT, {**text, "echo": None, "logprobs": 2.0, "add_special_tokens": None}),
        (NATIVE, {"text": "hi", "stream": None, "image_data": [], "log_metrics": True, "lora_path": None}),
        (NATIVE, {"text": "hi", "sampling_params": {"max_new_tokens": 2.0, "n": 1.0, "stop_regex": [], "foo": None}}),
        (NATIVE, {"text": "hi", "sampling_params": {"max_new_tokens": 2, "stream_interval": 1, "min_p": None}}),
        (RESPONSES, {**response, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "store": False}),
        *((RESPONSES, {**response, "background": nothing, "foo": nothing}) for nothing in NOTHING),
        (RESPONSES, {**response, "max_output_tokens": 2.0, "top_logprobs": 0, "max_tool_calls": 3.0, "user": None}),
    ]
    return cases


def test_neutral_fields_of_all_endpoints(shared: Served) -> None:
    for path, sent in bodies():
        response = shared.client.post(path, json=sent)
        assert response.status_code == 200, (sent, response.text)


def test_no_limit(shared: Served) -> None:
    shared.fakes.eos_at = 3
    try:
        for path, sent in (
            (CHAT, {"messages": [USER], "max_tokens": -1}),
            (CHAT, {"messages": [USER], "max_completion_tokens": -1.0}),
            (TEXT, {"prompt": "hi", "max_tokens": -1}),
            (NATIVE, {"text": "hi", "sampling_params": {"max_new_tokens": -1}}),
            (RESPONSES, {"input": "hi", "max_output_tokens": -1}),
        ):
            assert shared.client.post(path, json=sent).status_code == 200
            generate = shared.fakes.seen.generates[-1]
            assert generate.sampling.max_tokens == 512 - len(generate.prompt) // 4
    finally:
        shared.fakes.eos_at = None


def rendered(served: Served, *messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The messages that the chat template is given."""
    response = served.client.post(CHAT, json={"messages": [*messages, USER], "max_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    prompt = served.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    *others, user = json.loads(prompt.messages)
    assert user == USER
    return others


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PLAIN_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
SAID = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (
            {
                **SAID,
                **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "reasoning", "thinking_blocks")),
                **dict.fromkeys(("reasoning_details", "reasoning_content", "name", "parsed", "provider", "foo")),
                "annotations": [],
            },
            SAID,
        ),
        ({**SAID, "annotations": [{"type": "url_citation"}], "cache_control": {"type": "ephemeral"}}, SAID),
        ({**SAID, "reasoning": "y"}, {**SAID, "reasoning_content": "y"}),
        ({**SAID, "reasoning": "y", "reasoning_content": "y"}, {**SAID, "reasoning_content": "y"}),
        (
            {**SAID, "reasoning_details": [{"type": "reasoning.text", "text": "a", "format": "unknown", "index": 0}]},
            {**SAID, "reasoning_content": "a"},
        ),
        (
            {**SAID, "thinking_blocks": [{"type": "thinking", "thinking": "a", "signature": "s"}]},
            {**SAID, "reasoning_content": "a"},
        ),
        ({**SAID, "thinking_blocks": [{"type": "redacted_thinking", "data": "s"}]}, SAID),
        ({"role": "assistant", "content": None}, {**SAID, "content": ""}),
        ({"role": "assistant"}, {**SAID, "content": ""}),
        ({"role": "assistant", "content": []}, {**SAID, "content": ""}),
        ({"role": "assistant", "content": None, "refusal": "No."}, {**SAID, "content": "No."}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, {**SAID, "content": "No."}),
        (
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0, "extra_content": None}]},
            {**SAID, "content": "", "tool_calls": [PLAIN_CALL]},
        ),
        (
            {**SAID, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": None}, "type": None}]},
            {**SAID, "tool_calls": [PLAIN_CALL]},
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {**SAID, "content": "", "tool_calls": [{"type": "function", "function": PLAIN_CALL["function"]}]},
        ),
        (
            {"role": "function", "name": "f", "content": "r"},
            {"role": "tool", "name": "f", "content": "r"},
        ),
        (
            {"role": "tool", "tool_call_id": "1", "content": None},
            {"role": "tool", "tool_call_id": "1", "content": ""},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": "x"},
        ),
        ({"role": "user", "content": [{"type": "text", "text": "x", "foo": None}]}, {"role": "user", "content": "x"}),
    ],
)
def test_messages_that_clients_send_back(shared: Served, message: Any, plain: Any) -> None:
    assert rendered(shared, message) == [plain]


def test_what_the_template_is_told(shared: Served) -> None:
    rendered(shared, verbosity="low", documents=[{"title": "a", "text": "b"}], reasoning_effort="high")
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.template_arguments) == {
        "reasoning_effort": "high",
        "verbosity": "low",
        "documents": [{"title": "a", "text": "b"}],
    }


def test_a_tool_with_cache_control(shared: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": None, "foo": None}}
    rendered(shared, tools=[{**tool, "cache_control": {"type": "ephemeral"}}])
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.tools) == [{"type": "function", "function": {"name": "f"}}]


def test_a_large_document_is_looked_at_once() -> None:
    parts = [b'{"type":"b"}'] * 70_000
    with pytest.raises(ApiError, match="foo"):
        decoded(b'{"foo":null,"parts":[' + b",".join(parts) + b"]}", DECODER)
    found = decoded(
        msgspec.json.encode({"foo": None, "name": "{[" * 100_000, "parts": [{"type": "b"}] * 9_000}), DECODER
    )
    assert len(found.parts) == 9_000
