"""POST /v1/chat/completions, as plain HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import eventually

from llm_runtime.actors.messages import ChatPrompt

from .conftest import Served, chunks_of
from .fakes import EOS, answer, packed, piece, token_at

PROMPT = "user:hi\nassistant:"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "seed": 5, "max_tokens": 8, **fields}


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    response = served.client.post("/v1/chat/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    response = served.client.post("/v1/chat/completions", json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return chunks_of(response.text)


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_answer(shared: Served) -> None:
    document = ask(shared)
    assert document["object"] == "chat.completion"
    assert document["id"].startswith("chatcmpl-")
    assert document["model"] == "fake"
    assert document["system_fingerprint"] is None
    assert document["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": answer(PROMPT, 5, 8), "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "matched_stop": None,
        }
    ]
    assert document["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 8,
        "total_tokens": len(PROMPT) + 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_stream(shared: Served) -> None:
    chunks = stream(shared)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(chunks) == answer(PROMPT, 5, 8)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_in_a_stream(shared: Served) -> None:
    *chunks, last = stream(shared, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    *chunks, last = stream(shared, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 8


def test_several_choices_have_seeds_of_their_own(shared: Served) -> None:
    texts = [answer(PROMPT, 5 + i, 8) for i in range(3)]
    assert len(set(texts)) == 3
    document = ask(shared, n=3)
    assert [choice["message"]["content"] for choice in document["choices"]] == texts
    assert document["usage"]["prompt_tokens"] == len(PROMPT)
    assert document["usage"]["completion_tokens"] == 24
    chunks = stream(shared, n=3)
    assert [content(chunks, i) for i in range(3)] == texts


def test_no_seed_draws_a_new_one_each_time(shared: Served) -> None:
    shared.fakes.seen.generates.clear()
    for _ in range(2):
        ask(shared, seed=None)
    seeds = {generate.sampling.seed for generate in shared.fakes.seen.generates}
    assert len(seeds) == 2


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_seeds(shared: Served, seed: int) -> None:
    assert ask(shared, seed=seed)["choices"] == ask(shared, seed=seed)["choices"]


def test_stop_string(shared: Served) -> None:
    whole = answer(PROMPT, 5, 8)
    stop = whole[12:15]
    at = whole.index(stop)
    for choice in (ask(shared, stop=stop)["choices"][0], ask(shared, stop=["never", stop])["choices"][0]):
        assert choice["message"]["content"] == whole[:at]
        assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", stop)
    assert content(stream(shared, stop=stop)) == whole[:at]
    for keep in ("no_stop_trim", "include_stop_str_in_output"):
        assert ask(shared, stop=stop, **{keep: True})["choices"][0]["message"]["content"] == whole[: at + len(stop)]


def test_stop_token(shared: Served) -> None:
    token = token_at(packed(PROMPT), 5, 3)
    choice = ask(shared, stop_token_ids=[token])["choices"][0]
    assert choice["matched_stop"] == token
    assert choice["message"]["content"] == answer(PROMPT, 5, 3)
    shared.fakes.eos_at = 4
    try:
        choice = ask(shared)["choices"][0]
        assert (choice["matched_stop"], choice["message"]["content"]) == (EOS, answer(PROMPT, 5, 4))
        assert ask(shared, ignore_eos=True)["choices"][0]["message"]["content"] == answer(PROMPT, 5, 8)
    finally:
        shared.fakes.eos_at = None


def test_logprobs(shared: Served) -> None:
    choice = ask(shared, logprobs=True, top_logprobs=2)["choices"][0]
    tokens = [token_at(packed(PROMPT), 5, i) for i in range(8)]
    entries = choice["logprobs"]["content"]
    assert [bytes(entry["bytes"]).decode() for entry in entries] == [piece(token) for token in tokens]
    assert [entry["logprob"] for entry in entries] == [-0.25 - token % 8 for token in tokens]
    assert [top["token"] for top in entries[0]["top_logprobs"]] == [piece(tokens[0]), piece(tokens[0] + 1)]
    assert ask(shared, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    streamed = [
        entry
        for chunk in stream(shared, logprobs=True, top_logprobs=2)
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == entries


def test_what_the_engine_is_told(shared: Served) -> None:
    shared.fakes.seen.generates.clear()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "logit_bias": {"7": -5},
        "priority": 3,
        "cache_salt": "tenant",
        "skip_special_tokens": False,
        "stop_token_ids": [9, 9],
        "max_completion_tokens": 6,
    }
    ask(shared, **fields)
    (generate,) = shared.fakes.seen.generates
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.2, -0.3, 1.1)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.seed) == (2, 6, 5)
    assert (sampling.logit_bias, sampling.stop_token_ids) == ({7: -5.0}, [EOS, 9])
    assert (sampling.logprobs, sampling.prompt_logprobs) == (-1, -1)
    assert (generate.priority, generate.extra_key) == (3, "tenant")
    assert not generate.text.skip_special_tokens
    assert 0 < generate.timeout_s <= 60


@pytest.mark.parametrize(("temperature", "told"), [(0, 0.0), (1e-9, 0.0), (None, 1.0), (2, 2.0)])
def test_temperature(shared: Served, temperature: float | None, told: float) -> None:
    shared.fakes.seen.generates.clear()
    ask(shared, temperature=temperature, top_k=-1)
    assert shared.fakes.seen.generates[0].sampling.temperature == told
    assert shared.fakes.seen.generates[0].sampling.top_k == 0


def test_without_max_tokens_the_answer_may_fill_the_context(shared: Served) -> None:
    shared.fakes.eos_at = 3
    try:
        ask(shared, max_tokens=None)
    finally:
        shared.fakes.eos_at = None
    assert shared.fakes.seen.generates[-1].sampling.max_tokens == 512 - len(PROMPT)


def test_messages_reach_the_chat_template(shared: Served) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "wörld 😀"}]},
        {"role": "assistant", "content": "Sure", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    ask(shared, messages=messages, continue_final_message=True, chat_template_kwargs={"enable_thinking": False})
    prompt = shared.fakes.seen.tokenizes[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.messages) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello wörld 😀"},
        {"role": "assistant", "content": "Sure"},
    ]
    assert (prompt.add_generation_prompt, prompt.continue_final_message) == (False, True)
    assert json.loads(prompt.template_arguments) == {"enable_thinking": False}


def test_harmless_fields_are_accepted(shared: Served) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "tools": [],
        "modalities": ["text"],
        "n": 1,
        "stop": None,
        "logit_bias": None,
        "logprobs": False,
    }
    assert ask(shared, **harmless)["choices"][0]["message"]["content"] == answer(PROMPT, 5, 8)


def test_finished_requests_are_acknowledged(shared: Served) -> None:
    identity = ask(shared)["id"].removeprefix("chatcmpl-")
    eventually(lambda: identity in shared.fakes.seen.acknowledged, "acknowledgement")


def test_template_failure_is_the_clients_error(shared: Served) -> None:
    response = shared.client.post("/v1/chat/completions", json=body(chat_template_kwargs={"fail": 1}))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The chat template cannot render this."
