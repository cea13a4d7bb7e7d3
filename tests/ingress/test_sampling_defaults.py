"""What is drawn for requests that do not say how: the client goes before the model, and the model before the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_runtime.actors.messages import SamplingParams

from .conftest import Served, one_ingress

DEFAULTS = {
    "temperature": 0.25,
    "top_p": 0.75,
    "top_k": 30,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "max_tokens": 6,
    "max_repeats": 16,
}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), sampling=DEFAULTS) as served:
        yield served


def told(served: Served, path: str, body: dict[str, Any]) -> SamplingParams:
    """What the engine was told for a request."""
    served.fakes.seen.generates.clear()
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return served.fakes.seen.generates[0].sampling


@pytest.mark.parametrize(
    ("path", "body", "max_tokens"),
    [
        ("/v1/chat/completions", CHAT, 6),
        ("/v1/chat/completions", {**CHAT, "min_tokens": 7}, 7),
        ("/v1/responses", {"input": "hi", "store": False}, 6),
        ("/v1/completions", {"prompt": "hi"}, 16),
        ("/v1/messages", {"model": "fake", "max_tokens": 9, **CHAT}, 9),
        ("/api/chat", {"model": "fake", "stream": False, **CHAT}, 6),
        ("/api/generate", {"model": "fake", "stream": False, "prompt": "hi"}, 6),
        ("/generate", {"text": "hi"}, 128),
    ],
)
def test_every_protocol_takes_the_models(shared: Served, path: str, body: dict[str, Any], max_tokens: int) -> None:
    sampling = told(shared, path, body)
    drawn = sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty
    assert drawn == (0.25, 0.75, 30, 0.125, 1.5)
    assert (sampling.max_tokens, sampling.max_repeats) == (max_tokens, 16)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {**CHAT, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 8},
        ),
        (
            "/api/chat",
            {
                **CHAT,
                "model": "fake",
                "stream": False,
                "options": {
                    "temperature": 0,
                    "top_p": 1,
                    "top_k": -1,
                    "min_p": 0,
                    "repeat_penalty": 1,
                    "num_predict": 8,
                },
            },
        ),
    ],
)
def test_the_client_has_the_last_word(shared: Served, path: str, body: dict[str, Any]) -> None:
    sampling = told(shared, path, body)
    drawn = sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty
    assert drawn == (0, 1, 0, 0, 1)
    assert sampling.max_tokens == 8


@pytest.mark.parametrize(("asked", "said"), [({}, (0.25, 0.75)), ({"temperature": 0.5, "top_p": 0.875}, (0.5, 0.875))])
def test_a_response_says_how_it_was_sampled(shared: Served, asked: dict[str, Any], said: tuple[float, float]) -> None:
    answer = shared.client.post("/v1/responses", json={"input": "hi", "store": False, **asked}).json()
    assert (answer["temperature"], answer["top_p"]) == said


def test_no_limit_is_a_word_too(shared: Served) -> None:
    body = {"model": "fake", "stream": False, "options": {"num_predict": -1}, **CHAT}
    assert told(shared, "/api/chat", body).max_tokens > 100


def test_who_ignores_the_end_wants_repetitions(shared: Served) -> None:
    assert told(shared, "/v1/chat/completions", {**CHAT, "ignore_eos": True}).max_repeats == 0


def test_clients_can_ask(shared: Served) -> None:
    assert shared.client.get("/get_model_info").json()["preferred_sampling_params"] == DEFAULTS
