"""POST /generate, SGLang's native endpoint."""

from __future__ import annotations

import json
from typing import Any

from .conftest import Served, chunks_of
from .fakes import answer, packed, token_at


def ask(served: Served, **fields: Any) -> Any:
    params = {"max_new_tokens": 6, "sampling_seed": 3, **fields.pop("sampling_params", {})}
    response = served.client.post("/generate", json={"sampling_params": params, **fields})
    assert response.status_code == 200, response.text
    return response.json() if not fields.get("stream") else chunks_of(response.text)


def test_answer(shared: Served) -> None:
    document = ask(shared, text="Once", rid="mine")
    meta = document["meta_info"]
    assert document["text"] == answer("Once", 3, 6)
    assert document["output_ids"] == [token_at(packed("Once"), 3, i) for i in range(6)]
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("mine", 4, 6, 1)
    assert meta["e2e_latency"] > 0
    assert ask(shared, input_ids=list(b"Once"))["text"] == document["text"]


def test_stop(shared: Served) -> None:
    whole = answer("Once", 3, 6)
    document = ask(shared, text="Once", sampling_params={"stop": whole[10:12]})
    assert document["meta_info"]["finish_reason"] == {"type": "stop", "matched": whole[10:12]}
    assert document["text"] == whole[: whole.index(whole[10:12])]
    token = token_at(packed("Once"), 3, 2)
    document = ask(shared, text="Once", sampling_params={"stop_token_ids": [token]})
    assert document["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}


def test_stream_is_cumulative(shared: Served) -> None:
    documents = ask(shared, text="Once", stream=True)
    whole = answer("Once", 3, 6)
    assert len(documents) > 1
    assert all(whole.startswith(document["text"]) for document in documents)
    assert documents[-1]["text"] == whole
    assert documents[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert documents[0]["meta_info"]["finish_reason"] is None


def test_batch_and_n(shared: Served) -> None:
    both = [answer("Once", 3, 6), answer("Twice", 3, 6)]
    assert [each["text"] for each in ask(shared, text=["Once", "Twice"])] == both
    assert [each["text"] for each in ask(shared, input_ids=[list(b"Once"), list(b"Twice")])] == both
    several = ask(shared, text="Once", sampling_params={"n": 2})
    assert [each["text"] for each in several] == [answer("Once", 3, 6), answer("Once", 4, 6)]
    last = {document["index"]: document["text"] for document in ask(shared, text=["Once", "Twice"], stream=True)}
    assert last == dict(enumerate(both))


def test_logprobs(shared: Served) -> None:
    document = ask(shared, text="Once", return_logprob=True, top_logprobs_num=1, return_text_in_logprobs=True)
    meta = document["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert [token for _, token, _ in meta["output_token_logprobs"]] == document["output_ids"]
    assert "".join(text for _, _, text in meta["output_token_logprobs"]) == document["text"]
    assert [[top[1] for top in tops] for tops in meta["output_top_logprobs"]] == [[t] for t in document["output_ids"]]
    meta = ask(shared, text="Once", return_logprob=True, logprob_start_len=1)["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == list(b"nce")
    meta = ask(shared, text="Once", return_logprob=True, logprob_start_len=0)["meta_info"]
    assert meta["input_token_logprobs"][0] == [None, ord("O"), None]


def test_defaults(shared: Served) -> None:
    shared.fakes.seen.generates.clear()
    assert shared.client.post("/generate", content=json.dumps({"text": "x"}), headers=_JSON).status_code == 200
    sampling = shared.fakes.seen.generates[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (128, 1.0, 0)


_JSON = {"content-type": "application/json"}
