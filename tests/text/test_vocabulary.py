"""Vocabularies from GGUF files and Hugging Face directories, against transformers and against known facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from corpus import RANDOM_TEXTS, TEXTS
from text_harness import smollm2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import CONTROL, WORDS, byte_level_gguf, sentencepiece_gguf, trained

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.vocabulary import load_vocabulary, pack_ids, unpack_ids
from llm_runtime.actors.vocabulary.byte_alphabet import tokens_to_bytes

ALL_TEXTS = TEXTS + RANDOM_TEXTS

needs_smollm2 = pytest.mark.skipif(smollm2() is None, reason="the embedded model is not installed")


@cache
def transformers() -> Any:
    return pytest.importorskip("transformers")


def transformers_gguf(path: Path) -> Any:
    return transformers().AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def byte_level_reference(path: Path, pre: str) -> Any:
    """transformers' conversion, with what it leaves out."""
    loaded = transformers_gguf(path)
    backend = loaded.backend_tokenizer
    pattern = ""
    if pre == "qwen2":  # the NFC of Qwen2's own tokenizer
        backend.normalizer = normalizers.NFC()
        pattern = import_module("transformers.models.qwen2.tokenization_qwen2").PRETOKENIZE_REGEX
    if pre == "llama-bpe":  # the rule of Llama 3 that a word that is a token is not cut
        backend.model.ignore_merges = True
        pattern = import_module("transformers.convert_slow_tokenizer").TikTokenConverter().pattern
    # Before 5.20 each vocabulary is taken for GPT-2's, with a decoder for sentencepiece, and words that are not special
    # are left out.
    if pattern:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    loaded.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return loaded


# -- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "qwen2"])
def test_byte_level_gguf_equals_transformers(tmp_path: Path, pre: str) -> None:
    path = byte_level_gguf(tmp_path / "v.gguf", pre)
    vocabulary, reference = load_vocabulary(path), byte_level_reference(path, pre)
    for text in [*ALL_TEXTS, "a<think>b</think> <|end|>\nc"]:
        ids = vocabulary.encode(text, add_special=False)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert vocabulary.decode(ids, skip_special=False) == reference.decode(ids), text
        assert vocabulary.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True), text


def test_names_with_characters_outside_the_alphabet(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(byte_level_gguf(tmp_path / "v.gguf", "gpt-2"))
    size = vocabulary.size - len(CONTROL) - len(WORDS)
    assert vocabulary.encode("x<｜eot｜>", add_special=False)[-1] == size + 2
    assert vocabulary.token_bytes[size + 2] == "<｜eot｜>".encode()
    assert vocabulary.decode([size + 2, size + 3], skip_special=True) == "<think>"
    assert vocabulary.special_ids == {size, size + 1, size + 2}
    assert (vocabulary.bos_id, vocabulary.eos_ids) == (size, (size + 1, size + 2))


def test_an_answer_ends_with_what_is_called_an_end(tmp_path: Path) -> None:
    """Llama 3's first files name <|end_of_text|> alone, and chats end with <|eot_id|>."""
    tokens = [*trained(byte_level=True)[0], "<|eot_id|>", "<|end_of_text|>", "<|im_end|>"]
    size = len(tokens)
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * (size - 3), 3, 3, 1],
        "tokenizer.ggml.eos_token_id": size - 2,
        "tokenizer.ggml.eot_token_id": None,
        "tokenizer.ggml.bos_token_id": None,
    }
    path = byte_level_gguf(tmp_path / "v.gguf", "llama-bpe", **changes)
    assert load_vocabulary(path).eos_ids == (size - 2, size - 3)


def test_words_that_only_pad_the_table_are_not_words(tmp_path: Path) -> None:
    vocab, _ = trained(byte_level=True)
    size = len(vocab)
    tokens = [*sorted(vocab, key=vocab.__getitem__), f"[PAD{size}]", "[PAD7]"]
    path = byte_level_gguf(
        tmp_path / "v.gguf",
        "gpt-2",
        **{
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * size + [4, 4],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.eot_token_id": None,
        },
    )
    vocabulary = load_vocabulary(path)
    assert size not in vocabulary.encode(f"[PAD{size}]", add_special=False)
    assert vocabulary.encode("[PAD7]", add_special=False) == [size + 1]


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos(tmp_path: Path, pre: str, stated: bool | None, expected: bool) -> None:
    vocabulary = load_vocabulary(byte_level_gguf(tmp_path / "v.gguf", pre, **{"tokenizer.ggml.add_bos_token": stated}))
    plain = vocabulary.encode("hi", add_special=False)
    assert vocabulary.encode("hi", add_special=True) == ([vocabulary.bos_id] if expected else []) + plain


def test_sentencepiece_gguf_equals_transformers(tmp_path: Path) -> None:
    path = sentencepiece_gguf(tmp_path / "v.gguf")
    vocabulary, reference = load_vocabulary(path), transformers_gguf(path)
    compared = 0
    for text in ALL_TEXTS:
        bos, *ids = vocabulary.encode(text, add_special=True)
        assert bos == vocabulary.bos_id == 1  # transformers before 5.20 leaves it out
        assert vocabulary.decode([bos, *ids], skip_special=True) == text
        if not text.startswith(" ") and text:  # transformers adds no prefix space before a space, sentencepiece does
            assert ids == reference.encode(text, add_special_tokens=False), text
            assert vocabulary.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True)
            compared += 1
    assert compared > 40


def test_sentencepiece_facts(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(sentencepiece_gguf(tmp_path / "v.gguf"))

    def spelled(text: str) -> str:
        return b"".join(vocabulary.token_bytes[token] for token in vocabulary.encode(text, add_special=False)).decode()

    assert spelled("hi") == " hi"
    assert spelled("  hi") == "   hi"
    unseen = vocabulary.encode("\U0001f9ff", add_special=False)[-4:]
    assert b"".join(vocabulary.token_bytes[token] for token in unseen) == "\U0001f9ff".encode()
    assert vocabulary.decode(unseen[:2], skip_special=True) == "\ufffd"
    assert vocabulary.special_ids == {0, 1, 2}

    bare = load_vocabulary(sentencepiece_gguf(tmp_path / "w.gguf", **{"tokenizer.ggml.add_space_prefix": False}))
    assert bare.decode(bare.encode(" hi", add_special=False), skip_special=True) == " hi"
    assert bare.decode(bare.encode("hi", add_special=False), skip_special=True) == "hi"
    assert bare.encode(" hi", add_special=False) == vocabulary.encode("hi", add_special=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "'kimi-k2'"),
        ({"tokenizer.ggml.bos_token_id": 1_000_000}, "1000000"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "2 token types"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "does not hold strings"),
        ({"tokenizer.ggml.tokens": "x"}, "is a str, not a list"),
    ],
)
def test_unsupported_gguf(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = byte_level_gguf(tmp_path / "v.gguf", "gpt-2", **change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_vocabulary(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("merges", [["Ġ t x"], ["Ġt"], ["Ġ qqqqq"]])
def test_bad_merges(tmp_path: Path, merges: list[str]) -> None:
    vocabulary = load_vocabulary(byte_level_gguf(tmp_path / "v.gguf", "gpt-2", **{"tokenizer.ggml.merges": merges}))
    with pytest.raises(CheckpointError, match="corrupt"):
        vocabulary.encode("x", add_special=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_vocabulary(tmp_path / "absent.gguf")


@needs_smollm2
def test_smollm2_equals_the_original() -> None:
    """The original's tokenizer.json cuts digits one by one and then words as GPT-2 does; transformers' conversion of
    the GGUF leaves the digits together."""
    path = smollm2()
    assert path is not None
    vocabulary, reference = load_vocabulary(path), transformers_gguf(path)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    chat = "<|im_start|>user\nHi 123<|im_end|>\n<|im_start|>assistant\n"
    for text in [*ALL_TEXTS, chat]:
        ids = vocabulary.encode(text, add_special=True)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert vocabulary.decode(ids, skip_special=False) == text
        assert vocabulary.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True)


@needs_smollm2
def test_smollm2_facts() -> None:
    path = smollm2()
    assert path is not None
    vocabulary = load_vocabulary(path)
    assert vocabulary.size == 49_152
    assert (vocabulary.bos_id, vocabulary.eos_ids) == (1, (2,))
    assert vocabulary.special_ids == set(range(17))
    assert [vocabulary.token_bytes[token] for token in vocabulary.encode("2024", add_special=True)] == [
        b"2", b"0", b"2", b"4",
    ]  # fmt: skip
    assert vocabulary.encode("<|im_start|>", add_special=True) == [1]
    assert vocabulary.special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in vocabulary.chat_templates["default"]


# -- Hugging Face directories --------------------------------------------------------------------------------------


def byte_level_tokenizer() -> Tokenizer:
    vocab, merges = trained(byte_level=True)
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in CONTROL])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in WORDS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    vocab, merges = trained(byte_level=False)
    names = ["<unk>", "<|begin|>", "<|end|>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    ids = {token: place for place, token in enumerate([*names, *vocab])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<|begin|>", "<|end|>"])
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    vocab, _ = trained(byte_level=False)
    pieces = [("<unk>", 0.0), *((token, -1.0 - rank / 100) for rank, token in enumerate(vocab))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def directory(path: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.mark.parametrize("holes", [0, 7])
def test_added_tokens_have_the_ids_that_the_tokenizer_gives_them(tmp_path: Path, holes: int) -> None:
    """Whatever the file states: ids with a gap before them, ids of others, another id for a token of the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**dict(zip(alphabet, range(256), strict=True)), "old": 256, "last": 257 + holes}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    file = json.loads(tokenizer.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [("<far>", 338, True), ("old", 400, True), ("<taken>", 3, False), ("last", 5, False), ("<end>", 339, True)]
    file["added_tokens"] = [
        {"content": text, "id": token, "special": special, **plain} for text, token, special in added
    ]
    path = directory(tmp_path, Tokenizer.from_str(json.dumps(file)), eos_token="<end>")
    (path / "tokenizer.json").write_text(json.dumps(file))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    vocabulary, reference = load_vocabulary(path), Tokenizer.from_str(json.dumps(file))
    for text, _, _ in added:
        token = reference.token_to_id(text)
        assert vocabulary.encode(f"a{text}", add_special=False)[-1] == token
        assert vocabulary.token_bytes[token] == text.encode()
    assert vocabulary.eos_ids[0] == reference.token_to_id("<end>")


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (byte_level_tokenizer, {"bos_token": "<|begin|>", "eos_token": "<|end|>"}),
        (byte_level_tokenizer, {"bos_token": "<|begin|>", "add_bos_token": False, "add_eos_token": True}),
        (byte_level_tokenizer, {"eos_token": {"__type": "AddedToken", "content": "<think>", "special": False}}),
        (sentencepiece_tokenizer, {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": "<unk>"}),
        (unigram_tokenizer, {"unk_token": "<unk>"}),
    ],
)
def test_directory_equals_transformers(tmp_path: Path, build: Callable[[], Tokenizer], config: dict[str, Any]) -> None:
    path = directory(tmp_path, build(), **config)
    vocabulary = load_vocabulary(path)
    reference = transformers().PreTrainedTokenizerFast.from_pretrained(str(path))
    assert vocabulary.special_ids == set(reference.all_special_ids) | {
        token for token, added in reference.added_tokens_decoder.items() if added.special
    }
    assert vocabulary.bos_id == reference.bos_token_id
    assert vocabulary.eos_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    for text in [*TEXTS, *RANDOM_TEXTS[:10], "a<think>b</think> <|end|>\nc"]:
        for special in (False, True):
            ids = vocabulary.encode(text, add_special=special)
            assert ids == reference.encode(text, add_special_tokens=special), text
        assert vocabulary.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True), text
        assert vocabulary.decode(ids, skip_special=False) == reference.decode(ids), text


def test_eos_ids_of_all_files(tmp_path: Path) -> None:
    path = directory(tmp_path, byte_level_tokenizer(), eos_token="<|end|>")
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.6}')
    (path / "config.json").write_text('{"eos_token_id": 5, "model_type": "llama", "limits": [0.0, Infinity]}')
    tokenizer = byte_level_tokenizer()
    assert load_vocabulary(path).eos_ids == (tokenizer.token_to_id("<|end|>"), 5, 7)


def test_chat_templates_of_all_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path = directory(tmp_path, byte_level_tokenizer(), chat_template=named)
    assert load_vocabulary(path).chat_templates == {"default": "D", "tool_use": "T"}
    (path / "chat_template.jinja").write_text("J")
    assert load_vocabulary(path).chat_templates == {"default": "J"}
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("U", encoding="utf-8-sig")
    assert load_vocabulary(path).chat_templates == {"default": "J", "tool_use": "U"}


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    vocabulary = load_vocabulary(directory(tmp_path, tokenizer))
    text = "one two three four five six seven"
    assert vocabulary.decode(vocabulary.encode(text, add_special=False), skip_special=False) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer.json"),
        ("{", "truncated"),
        ("{}", "missing required field"),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}', "WordLevel"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": null}', "decoder none"),
        ('{"model": {"type": "BPE", "vocab": {"a": 99999999999}}, "decoder": {"type": "ByteLevel"}}', "makes no sense"),
        ('{"model": {"type": "BPE", "vocab": {}}, "decoder": {"type": "ByteLevel"}}', "makes no sense"),
    ],
)
def test_unsupported_directory(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_vocabulary(tmp_path)


# -- parts ---------------------------------------------------------------------------------------------------------


def test_byte_alphabet() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(tokens_to_bytes(alphabet)) == [bytes([byte]) for byte in range(256)]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        spelled = "".join(piece for piece, _ in spell.pre_tokenize_str(text))
        assert tokens_to_bytes([spelled]) == [text.encode()]
    odd = ["a b", "\ue000", "x\ue000y", "\xad", "｜", "", "Ġa"]
    assert tokens_to_bytes(odd) == [*(text.encode() for text in odd[:-1]), b" a"]
    assert tokens_to_bytes([]) == []


def test_packed_ids() -> None:
    assert unpack_ids(pack_ids([0, 1, 2**31 - 1])) == [0, 1, 2**31 - 1]
    assert pack_ids([258]) == b"\x02\x01\x00\x00"
    with pytest.raises(ValueError):
        unpack_ids(b"abc")
