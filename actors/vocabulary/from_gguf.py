"""Vocabularies in GGUF files, under llama.cpp's keys `tokenizer.ggml.*`.

Two kinds are supported: byte-level BPE (`gpt2`), which lists its merges, and sentencepiece BPE with byte fallback
(`llama`), which lists a score for each token from which the merges follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from llm_runtime.actors.checkpoint import CheckpointError, GGUFFile
from llm_runtime.actors.checkpoint.config_of_gguf import ENDS_OF_TURNS
from llm_runtime.actors.checkpoint.gguf import MetadataValue
from llm_runtime.actors.vocabulary.byte_alphabet import tokens_to_bytes
from llm_runtime.actors.vocabulary.pre_tokenizers import PRE_TOKENIZERS
from llm_runtime.actors.vocabulary.sentencepiece import PREFIX, merges_of_scores, piece_to_bytes
from llm_runtime.actors.vocabulary.vocabulary import Vocabulary

Value = TypeVar("Value")

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Token types of llama.cpp that matter here (`llama_token_type`)."""
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_TEMPLATE = "tokenizer.chat_template"


def vocabulary_from_gguf(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises CheckpointError if it is damaged or of a kind that is not supported."""
    fields = _Fields(path, GGUFFile(path).metadata)
    model = fields.required("tokenizer.ggml.model", str)
    if model == "gpt2":
        return _byte_level(fields)
    if model == "llama":
        return _sentencepiece(fields)
    raise CheckpointError(
        f"{path}: its tokenizer is of kind {model!r}; supported kinds are 'gpt2' (byte-level BPE) and 'llama' "
        "(sentencepiece BPE)"
    )


class _Fields:
    """Typed access to the tokenizer's part of the metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, MetadataValue]) -> None:
        self.path = path
        self.metadata = metadata
        self.tokens = self.strings("tokenizer.ggml.tokens")
        if not self.tokens:
            raise CheckpointError(f"{path}: holds no tokens")
        self.types = self._types()

    def required(self, key: str, kind: type[Value]) -> Value:
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: has no metadata {key!r}, so its tokenizer is unknown")
        return value

    def optional(self, key: str, kind: type[Value]) -> Value | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: metadata {key!r} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.required(key, list)
        if value and not isinstance(value[0], str):
            raise CheckpointError(f"{self.path}: metadata {key!r} does not hold strings")
        return value

    def token_id(self, key: str) -> int | None:
        token = self.optional(f"tokenizer.ggml.{key}", int)
        if token is not None and not 0 <= token < len(self.tokens):
            raise CheckpointError(f"{self.path}: {key} is {token}, outside the {len(self.tokens)} tokens")
        return token

    def ids_of_type(self, kind: int) -> list[int]:
        return [token for token, its_type in enumerate(self.types) if its_type == kind]

    def added_words(self) -> list[int]:
        """Ids that are always taken whole and are not special. What only pads the table of tokens is left out."""
        return [token for token in self.ids_of_type(_USER_DEFINED) if self.tokens[token] != f"[PAD{token}]"]

    def special_tokens(self) -> dict[str, str]:
        ids = {name: self.token_id(key) for name, key in _SPECIAL_KEYS.items()}
        return {name: self.tokens[token] for name, token in ids.items() if token is not None}

    def eos_ids(self) -> list[int]:
        ids = [self.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        ends = [token for token in self.ids_of_type(_CONTROL) if self.tokens[token] in ENDS_OF_TURNS]
        return list(dict.fromkeys([*(token for token in ids if token is not None), *ends]))

    def chat_templates(self) -> dict[str, str]:
        templates = {}
        default = self.optional(_TEMPLATE, str)
        if default is not None:
            templates["default"] = default
        for key in self.metadata:
            if key.startswith(_TEMPLATE + "."):
                templates[key.removeprefix(_TEMPLATE + ".")] = self.required(key, str)
        return templates

    def surrounding_ids(self, add_bos: bool) -> tuple[list[int], list[int]]:
        """What a text begins and ends with; `add_bos` counts when the file does not say."""
        stated = self.optional("tokenizer.ggml.add_bos_token", bool)
        add_bos = add_bos if stated is None else stated
        bos, eos = self.token_id("bos_token_id"), self.token_id("eos_token_id")
        add_eos = self.optional("tokenizer.ggml.add_eos_token", bool)
        return ([bos] if add_bos and bos is not None else [], [eos] if add_eos and eos is not None else [])

    def _types(self) -> Sequence[int]:
        types = self.optional("tokenizer.ggml.token_type", list)
        if types is None:
            return []
        if len(types) != len(self.tokens) or not isinstance(types[0], int):
            raise CheckpointError(f"{self.path}: has {len(types)} token types for {len(self.tokens)} tokens")
        return types


def _byte_level(fields: _Fields) -> Vocabulary:
    name = fields.optional("tokenizer.ggml.pre", str) or "default"
    pre_tokenizer = PRE_TOKENIZERS.get(name)
    if pre_tokenizer is None:
        raise CheckpointError(
            f"{fields.path}: its pre-tokenizer is {name!r}; supported are {', '.join(PRE_TOKENIZERS)}. Use the model's "
            "Hugging Face directory, which has a tokenizer.json"
        )
    tokens, control, words = fields.tokens, fields.ids_of_type(_CONTROL), fields.added_words()
    token_bytes = tokens_to_bytes(tokens)
    for token in (*control, *words):
        token_bytes[token] = tokens[token].encode()
    prefix, suffix = fields.surrounding_ids(pre_tokenizer.add_bos)
    merges = fields.strings("tokenizer.ggml.merges")

    def build() -> Tokenizer:
        tokenizer = Tokenizer(
            _bpe(fields.path, tokens, _pairs(fields.path, merges), ignore_merges=pre_tokenizer.ignore_merges)
        )
        normalizer = pre_tokenizer.normalizer()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizer.build()
        tokenizer.decoder = decoders.ByteLevel()
        _add_tokens(tokenizer, tokens, control, words)
        return tokenizer

    return Vocabulary(
        token_bytes=token_bytes,
        special_ids=control,
        bos_id=fields.token_id("bos_token_id"),
        eos_ids=fields.eos_ids(),
        strips_leading_space=False,
        special_tokens=fields.special_tokens(),
        chat_templates=fields.chat_templates(),
        build_tokenizer=build,
        prefix_ids=prefix,
        suffix_ids=suffix,
    )


def _sentencepiece(fields: _Fields) -> Vocabulary:
    architecture = fields.optional("general.architecture", str) or ""
    if architecture.startswith("gemma"):
        raise CheckpointError(
            f"{fields.path}: the scores of {architecture} do not tell the order of its merges; use the model's Hugging "
            "Face directory, which has a tokenizer.json"
        )
    tokens = fields.tokens
    scores = fields.required("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens) or not isinstance(scores[0], float):
        raise CheckpointError(f"{fields.path}: has {len(scores)} token scores for {len(tokens)} tokens")
    unknown = fields.token_id("unknown_token_id")
    control = sorted({*fields.ids_of_type(_CONTROL), *([] if unknown is None else [unknown])})
    words = fields.added_words()
    prefix_space = fields.optional("tokenizer.ggml.add_space_prefix", bool)
    prefix_space = True if prefix_space is None else prefix_space
    prefix, suffix = fields.surrounding_ids(add_bos=True)

    def build() -> Tokenizer:
        special = {*control, *words, *fields.ids_of_type(_UNKNOWN)}
        merges = merges_of_scores(tokens, scores, special)
        model = _bpe(
            fields.path,
            tokens,
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
        tokenizer = Tokenizer(model)
        replace = normalizers.Replace(" ", PREFIX)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(PREFIX), replace]) if prefix_space else replace
        strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix_space else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(PREFIX, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        _add_tokens(tokenizer, tokens, control, words)
        return tokenizer

    return Vocabulary(
        token_bytes=[piece_to_bytes(token) for token in tokens],
        special_ids=control,
        bos_id=fields.token_id("bos_token_id"),
        eos_ids=fields.eos_ids(),
        strips_leading_space=prefix_space,
        special_tokens=fields.special_tokens(),
        chat_templates=fields.chat_templates(),
        build_tokenizer=build,
        prefix_ids=prefix,
        suffix_ids=suffix,
    )


def _pairs(path: Path, merges: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not left or not right or " " in right:
            raise CheckpointError(f"{path}: {merge!r} is not a merge of two tokens; the file is corrupt")
        pairs.append((left, right))
    return pairs


def _bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], **options: bool | str | None) -> models.BPE:
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):  # of tokens with one spelling the first counts
        vocab = dict(zip(reversed(tokens), reversed(range(len(tokens))), strict=True))
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception for a merge that is not a token
        raise CheckpointError(f"{path}: its merges do not fit its tokens ({error}); the file is corrupt") from None


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], control: Sequence[int], words: Sequence[int]) -> None:
    tokenizer.add_special_tokens([AddedToken(tokens[token], normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(tokens[token], normalized=False, special=False) for token in words])
