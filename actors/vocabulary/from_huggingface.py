"""Vocabularies in Hugging Face directories: `tokenizer.json`, `tokenizer_config.json`, chat templates.

`tokenizer.json` is what the `tokenizers` library reads; here its decoder is looked at too, for it says how tokens are
spelled. What a text begins and ends with is its post-processor's business alone, as in transformers.
`tokenizer_config.json` names the special tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.checkpoint.json_file import parse_json, read_json
from llm_runtime.actors.vocabulary.byte_alphabet import tokens_to_bytes
from llm_runtime.actors.vocabulary.sentencepiece import piece_to_bytes
from llm_runtime.actors.vocabulary.vocabulary import Vocabulary

_MAX_ID = 1 << 24


class _AddedToken(msgspec.Struct):
    content: str
    id: int = -1
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def as_special(self) -> AddedToken:
        return AddedToken(
            self.content,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            single_word=self.single_word,
            normalized=self.normalized,
            special=True,
        )


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: str = "BPE"


class _TokenizerFile(msgspec.Struct):
    model: _Model
    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    sep_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    cls_token: str | _AddedToken | None = None
    mask_token: str | _AddedToken | None = None
    added_tokens_decoder: dict[str, _AddedToken] = {}
    chat_template: str | list[_NamedTemplate] | None = None

    def named_tokens(self) -> dict[str, _AddedToken]:
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        values = {name: getattr(self, name) for name in names}
        return {
            name: _AddedToken(value) if isinstance(value, str) else value for name, value in values.items() if value
        }


class _EosConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def vocabulary_from_directory(path: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face directory. Raises CheckpointError if it is damaged or not supported."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path}: has no tokenizer.json; save the tokenizer with a version of transformers that writes one"
        )
    source = _read(file)
    tokenizer_file: _TokenizerFile = parse_json(file, source, _TokenizerFile)
    config_file, config = path / "tokenizer_config.json", _TokenizerConfig()
    if config_file.is_file():
        config = read_json(config_file, _TokenizerConfig, empty=config)

    spelling = _spelling(file, tokenizer_file)
    ids = _ids(tokenizer_file.model)
    special = {token.content for token in tokenizer_file.added_tokens if token.special}
    words = {token.content for token in tokenizer_file.added_tokens if not token.special}
    _add(ids, tokenizer_file.added_tokens)
    # What only tokenizer_config.json calls special is a special token too, as it is to transformers.
    late = {token.content: token for token in config.added_tokens_decoder.values() if token.special}
    late.update((token.content, token) for token in config.named_tokens().values())
    late = {content: token for content, token in late.items() if content in ids and content not in special}
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= _MAX_ID or min(ids.values()) < 0:
        raise CheckpointError(f"{file}: its token ids go up to {size - 1}, which makes no sense")
    named = {name: token.content for name, token in config.named_tokens().items() if token.content in ids}
    bos = ids[named["bos_token"]] if "bos_token" in named else None
    eos = ids[named["eos_token"]] if "eos_token" in named else None

    def build() -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_buffer(source)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: is not a tokenizer ({error})") from None
        if late:
            tokenizer.add_special_tokens([token.as_special() for token in late.values()])
        return tokenizer

    return Vocabulary(
        token_bytes=spelling.token_bytes(ids, size, special | words),
        special_ids=[ids[content] for content in (*special, *late)],
        bos_id=bos,
        eos_ids=_eos_ids(path, eos, size),
        strips_leading_space=spelling.strips_leading_space,
        special_tokens=named,
        chat_templates=_chat_templates(path, config),
        build_tokenizer=build,
    )


class _Spelling(msgspec.Struct, frozen=True):
    """How tokens are spelled: in the byte-level alphabet, as sentencepiece does, or as words and their continuations
    behind a `continuation` mark (WordPiece)."""

    byte_level: bool
    strips_leading_space: bool = False
    continuation: str = ""

    def token_bytes(self, ids: Mapping[str, int], size: int, added: set[str]) -> list[bytes]:
        if self.byte_level:
            spelled = tokens_to_bytes(list(ids))
            spelled = [
                content.encode() if content in added else each for content, each in zip(ids, spelled, strict=True)
            ]
        elif self.continuation:
            mark = self.continuation
            spelled = [
                (each.removeprefix(mark) if each.startswith(mark) else f" {each}").encode("utf-8", "surrogateescape")
                for each in ids
            ]
        else:
            spelled = [piece_to_bytes(content) for content in ids]
        table = [b""] * size
        for token, each in zip(ids.values(), spelled, strict=True):
            table[token] = each
        return table


def _spelling(file: Path, tokenizer_file: _TokenizerFile) -> _Spelling:
    decoder = tokenizer_file.decoder or {}
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    kinds = [str(step.get("type", "none")) for step in steps] if isinstance(steps, list) else []
    if tokenizer_file.model.type in ("BPE", "Unigram"):
        if kinds == ["ByteLevel"]:
            return _Spelling(byte_level=True)
        if kinds == ["Metaspace"]:
            strips = decoder.get("prepend_scheme", "always" if decoder.get("add_prefix_space", True) else "never")
            return _Spelling(byte_level=False, strips_leading_space=strips != "never")
        if kinds[:2] == ["Replace", "ByteFallback"] and set(kinds[2:]) <= {"Fuse", "Strip"}:
            return _Spelling(byte_level=False, strips_leading_space="Strip" in kinds)
    if tokenizer_file.model.type == "WordPiece" and kinds == ["WordPiece"]:
        mark = str(decoder.get("prefix") or "##")
        return _Spelling(byte_level=False, strips_leading_space=True, continuation=mark)
    raise CheckpointError(
        f"{file}: a {tokenizer_file.model.type} tokenizer with the decoder {'+'.join(kinds)} is "
        "not supported; byte-level, sentencepiece and WordPiece tokenizers are"
    )


def _ids(model: _Model) -> dict[str, int]:
    if isinstance(model.vocab, dict):
        return dict(model.vocab)
    return {piece: token for token, (piece, _) in enumerate(model.vocab)}


def _add(ids: dict[str, int], tokens: list[_AddedToken]) -> None:
    """The ids of added tokens are those that the tokenizers library gives them, not the stated ones: a token of the
    model keeps its id, and another has the next one behind the model's tokens."""
    following = len(ids)
    for token in tokens:
        if token.content not in ids:
            ids[token.content] = following
            following += 1


def _eos_ids(path: Path, eos: int | None, size: int) -> list[int]:
    found = [] if eos is None else [eos]
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.is_file():
            stated = read_json(file, _EosConfig, empty=_EosConfig()).eos_token_id
            found += stated if isinstance(stated, list) else [] if stated is None else [stated]
    return [token for token in dict.fromkeys(found) if 0 <= token < size]


def _chat_templates(path: Path, config: _TokenizerConfig) -> dict[str, str]:
    templates = {}
    if isinstance(config.chat_template, str):
        templates["default"] = config.chat_template
    elif config.chat_template is not None:
        templates = {each.name: each.template for each in config.chat_template}
    file = path / "chat_template.jinja"
    if file.is_file():
        templates = {"default": _read_text(file)}
    for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = _read_text(extra)
    return templates


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: is not UTF-8 text") from None


def _read(file: Path) -> bytes:
    """Without a byte order mark."""
    return file.read_bytes().removeprefix(codecs.BOM_UTF8).strip()
