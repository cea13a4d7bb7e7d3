"""Prompts that have the model fill in the middle, in each family's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_harness import Node
from vocabularies import byte_level_gguf, sentencepiece_gguf, trained

from llm_runtime.actors.checkpoint.gguf import GGUFFile
from llm_runtime.actors.messages import FillPrompt, Tokenize, Tokenized, TokenizeFailed
from llm_runtime.actors.tokenizer.fill_in import FORMATS, Format, fill_in
from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary, unpack_ids

BEFORE, BEHIND = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))"


def with_tokens(path: Path, names: list[str]) -> Path:
    vocab, _ = trained(byte_level=True)
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<s>", "</s>", *names]
    types = [1] * len(vocab) + [3] * (len(tokens) - len(vocab))
    extra: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return byte_level_gguf(path, "llama-bpe", **extra, **{"tokenizer.ggml.eot_token_id": None})


def named(vocabulary: Vocabulary, ids: list[int]) -> str:
    return vocabulary.decode(ids, skip_special=False)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.prefix)
@pytest.mark.parametrize("add_special", [True, False])
def test_formats(tmp_path: Path, form: Format, add_special: bool) -> None:
    markers = [each for each in (form.prefix, form.suffix, form.middle) if each]
    vocabulary = load_vocabulary(with_tokens(tmp_path / "m.gguf", [*markers, *form.ends[:1]]))
    found = fill_in(vocabulary, BEFORE, BEHIND, add_special)
    assert found is not None
    ids, ends = found
    first, second = form.prefix + BEFORE, form.suffix + BEHIND
    begin = "<s>" if add_special else ""
    assert named(vocabulary, ids) == begin + (second + first if form.suffix_first else first + second) + form.middle
    assert [named(vocabulary, [each]) for each in ends] == [*markers, *form.ends[:1]]


def test_sentencepiece_puts_no_space_behind_the_gap(tmp_path: Path) -> None:
    path = sentencepiece_gguf(tmp_path / "m.gguf")
    vocabulary = load_vocabulary(path)
    size = vocabulary.size
    names = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]

    metadata = dict(GGUFFile(path).metadata)
    extra = {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *names],
        "tokenizer.ggml.scores": [*map(float, metadata["tokenizer.ggml.scores"]), *[0.0] * 4],
        "tokenizer.ggml.token_type": [*map(int, metadata["tokenizer.ggml.token_type"]), *[3] * 4],
    }
    vocabulary = load_vocabulary(sentencepiece_gguf(tmp_path / "n.gguf", **extra))
    found = fill_in(vocabulary, "a", "b", add_special=True)
    assert found is not None
    ids, ends = found
    assert ids[:2] == [1, size]
    middle = ids.index(size + 1)
    assert vocabulary.decode(ids[middle + 1 : -1], skip_special=False) == "b"
    assert vocabulary.token_bytes[ids[middle + 1]] == b"b"
    assert ids[-1] == size + 2
    assert ends == [size, size + 1, size + 2, size + 3]


def test_the_actor(tmp_path: Path) -> None:
    path = with_tokens(tmp_path / "m.gguf", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    for model, works in ((path, True), (byte_level_gguf(tmp_path / "n.gguf", "llama-bpe"), False)):
        directory = tmp_path / str(works)
        directory.mkdir()
        node = Node(
            directory, "llm_runtime.actors.tokenizer:Tokenizer", "tokenizer", {"model": str(model)}, ["ingress0"]
        ).start()
        try:
            node.send("ingress0", Tokenize("r", FillPrompt("a", "b")))
            answer = node.receive("ingress0", Tokenized if works else TokenizeFailed)
            if isinstance(answer, Tokenized):
                assert len(unpack_ids(answer.tokens)) == 6
                assert len(unpack_ids(answer.more)) == 3
            else:
                assert "leave out 'suffix'" in answer.error
        finally:
            node.close()
