"""Small vocabularies, trained on the corpus, as GGUF files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from corpus import RANDOM_TEXTS, TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CONTROL = ["<|begin|>", "<|end|>", "<｜eot｜>"]
WORDS = ["<think>", "</think>"]


@cache
def trained(byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small BPE vocabulary, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((TEXTS + RANDOM_TEXTS) * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level_gguf(path: Path, pre: str, **extra: Any) -> Path:
    vocab, merges = trained(byte_level=True)
    tokens = [*sorted(vocab, key=vocab.__getitem__), *CONTROL, *WORDS]
    size = len(vocab)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * size + [3] * len(CONTROL) + [4] * len(WORDS),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": size,
        "tokenizer.ggml.eos_token_id": size + 1,
        "tokenizer.ggml.eot_token_id": size + 2,
        **extra,
    }
    return write_gguf(path, {key: value for key, value in metadata.items() if value is not None})


def sentencepiece_gguf(path: Path, **extra: Any) -> Path:
    """The tokens of a trained BPE with scores in the order of its merges, as sentencepiece writes them."""
    vocab, merges = trained(byte_level=False)
    merged = list(dict.fromkeys(left + right for left, right in merges))
    characters = [token for token in vocab if len(token) == 1]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *merged, *characters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(characters))]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }
    return write_gguf(path, metadata)


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file without tensors. Lists are arrays of strings, float32 or int32; integers are uint32."""
    entries = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + entries)
    return path


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind, pack = {str: (8, _string), float: (6, _pack("<f")), int: (5, _pack("<i"))}[type(value[0])]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(pack, value))


def _pack(form: str) -> Callable[[Any], bytes]:
    return lambda value: struct.pack(form, value)
