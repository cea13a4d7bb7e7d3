"""The official client: what it parses and which errors it raises."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from llm_runtime.actors.messages import Generate, Refused

from .conftest import Serve, Served
from .fakes import answer

PROMPT = "user:hi\nassistant:"


@pytest.fixture(scope="module")
def client(shared: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0, timeout=30) as each:
        yield each


def test_chat(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], seed=5, max_completion_tokens=8, n=2
    )
    assert [choice.message.content for choice in completion.choices] == [answer(PROMPT, 5 + i, 8) for i in range(2)]
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 1


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], seed=5, max_tokens=2
    )
    client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "user", "content": "hi"},
            completion.choices[0].message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": "go on"},
        ],
        max_tokens=2,
    )


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            seed=5,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer(PROMPT, 5, 8)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_chat_stream_helper(client: openai.OpenAI, shared: Served) -> None:
    shared.fakes.eos_at = 8
    try:
        with client.chat.completions.stream(
            model="fake", messages=[{"role": "user", "content": "hi"}], seed=5, max_tokens=20, logprobs=True, n=2
        ) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
    finally:
        shared.fakes.eos_at = None
    assert [choice.message.content for choice in final.choices] == [answer(PROMPT, 5 + i, 8) for i in range(2)]
    assert final.choices[0].logprobs is not None
    assert len(final.choices[0].logprobs.content or []) == 9


def test_logprobs_and_stop(client: openai.OpenAI) -> None:
    whole = answer(PROMPT, 5, 8)
    completion = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        seed=5,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        stop=[whole[10:13]],
    )
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == whole[: whole.index(whole[10:13])]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="fake", prompt=["a", "b"], seed=1, max_tokens=3, logprobs=1, echo=True)
    assert [choice.text for choice in completion.choices] == [each + answer(each, 1, 3) for each in "ab"]
    chunks = list(client.completions.create(model="fake", prompt="a", seed=1, max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer("a", 1, 3)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "alias"]
    assert client.models.retrieve("alias").id == "alias"


def test_errors(client: openai.OpenAI, shared: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="fake", prompt="a", temperature=3)
    assert wrong.value.param == "temperature"

    def full(generate: Generate) -> Refused:
        return Refused(generate.rid, generate.attempt, 429, "The queue is full.", 1.0)

    shared.fakes.refuse = full
    try:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="The queue is full") as limited:
                client.completions.create(model="fake", prompt="a", stream=stream)
            assert limited.value.response.headers["retry-after"] == "1"
    finally:
        shared.fakes.refuse = lambda generate: None


def test_authentication_error(serve: Serve) -> None:
    served = serve(api_key="secret")
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret") as client:
        assert client.models.list().data


def test_an_error_in_a_stream(serve: Serve) -> None:
    served = serve(request_timeout_s=1)
    served.fakes.step_s = 0.1
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        pieces: list[str] = []
        stream = client.completions.create(model="fake", prompt="a", seed=1, max_tokens=200, stream=True)
        with pytest.raises(openai.APIError, match="longer than 1 seconds"):
            pieces.extend(chunk.choices[0].text for chunk in stream)
        assert pieces
        assert answer("a", 1, 200).startswith("".join(pieces))
