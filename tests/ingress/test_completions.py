"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from .conftest import Served, chunks_of
from .fakes import answer, packed, piece, token_at


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Once", "seed": 3, "max_tokens": 6, **fields}


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    response = served.client.post("/v1/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    response = served.client.post("/v1/completions", json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    return chunks_of(response.text)


def texts(document: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in document["choices"]]


def streamed(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["text"] for choice in choices)


def test_answer(shared: Served) -> None:
    document = ask(shared)
    assert document["object"] == "text_completion"
    assert document["id"].startswith("cmpl-")
    assert document["choices"] == [
        {
            "index": 0,
            "text": answer("Once", 3, 6),
            "logprobs": None,
            "finish_reason": "length",
            "matched_stop": None,
        }
    ]
    assert document["usage"]["prompt_tokens"] == 4
    assert streamed(stream(shared)) == answer("Once", 3, 6)


def test_default_is_sixteen_tokens(shared: Served) -> None:
    assert texts(ask(shared, max_tokens=None)) == [answer("Once", 3, 16)]


def test_all_kinds_of_prompts(shared: Served) -> None:
    ids, more = list(b"Once"), list(b"Twice!")
    assert texts(ask(shared, prompt=ids)) == [answer("Once", 3, 6)]
    both = [answer("Once", 3, 6), answer("Twice!", 3, 6)]
    assert texts(ask(shared, prompt=["Once", "Twice!"])) == both
    document = ask(shared, prompt=[ids, more])
    assert texts(document) == both
    assert document["usage"]["prompt_tokens"] == 10
    chunks = stream(shared, prompt=["Once", "Twice!"])
    assert [streamed(chunks, i) for i in range(2)] == both


def test_n_of_a_batch(shared: Served) -> None:
    wanted = [answer(prompt, seed, 6) for prompt in ("Once", "Twice!") for seed in (3, 4)]
    assert texts(ask(shared, prompt=["Once", "Twice!"], n=2, best_of=2)) == wanted
    chunks = stream(shared, prompt=["Once", "Twice!"], n=2)
    assert [streamed(chunks, i) for i in range(4)] == wanted


def test_echo(shared: Served) -> None:
    wanted = "Once" + answer("Once", 3, 6)
    assert texts(ask(shared, echo=True)) == [wanted]
    assert texts(ask(shared, echo=True, prompt=list(b"Once"))) == [wanted]
    assert streamed(stream(shared, echo=True)) == wanted


def test_echo_without_new_tokens_scores_the_prompt(shared: Served) -> None:
    (choice,) = ask(shared, echo=True, logprobs=1, max_tokens=0)["choices"]
    assert choice["text"] == "Once"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("Once")
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [None] + [-0.25 - byte % 8 for byte in b"nce"]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"n": -0.25 - ord("n") % 8}


def test_logprobs(shared: Served) -> None:
    (choice,) = ask(shared, logprobs=2)["choices"]
    tokens = [token_at(packed("Once"), 3, i) for i in range(6)]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [piece(token) for token in tokens]
    assert logprobs["top_logprobs"][0] == {piece(tokens[0]): -0.25 - tokens[0] % 8, piece(tokens[0] + 1): -20.0}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    chunks = stream(shared, logprobs=2)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [each for chunk in chunks for each in chunk["choices"][0]["logprobs"][name]] == logprobs[name]
    (choice,) = ask(shared, logprobs=0)["choices"]
    assert [list(each) for each in choice["logprobs"]["top_logprobs"]] == [[piece(token)] for token in tokens]
