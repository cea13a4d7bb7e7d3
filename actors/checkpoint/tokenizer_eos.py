"""The end-of-sequence token of a directory's tokenizer, for configurations that name none, or another."""

from __future__ import annotations

from pathlib import Path

import msgspec

from llm_runtime.actors.checkpoint.json_file import read_json


class _Token(msgspec.Struct):
    content: str
    id: int = -1


class _TokenizerConfig(msgspec.Struct):
    eos_token: str | _Token | None = None
    added_tokens_decoder: dict[str, _Token] | None = None


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_Token] | None = None


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _WholeFile(msgspec.Struct):
    model: _Model


def eos_of_tokenizer(path: Path) -> int | None:
    """Its id; None if there is none. Raises CheckpointError for files that are none.

    An answer ends with it, as in SGLang and vLLM, beside the tokens that the model's configurations name.
    """
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    config: _TokenizerConfig = read_json(file, _TokenizerConfig, empty=_TokenizerConfig())
    eos = config.eos_token.content if isinstance(config.eos_token, _Token) else config.eos_token
    if not eos:
        return None
    for number, token in (config.added_tokens_decoder or {}).items():
        if token.content == eos and number.isdecimal():
            return int(number)
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    added: _TokenizerFile = read_json(file, _TokenizerFile)
    for token in added.added_tokens or ():
        if token.content == eos and token.id >= 0:
            return token.id
    whole: _WholeFile = read_json(file, _WholeFile)
    vocab = whole.model.vocab
    if isinstance(vocab, dict):
        return vocab.get(eos)
    return next((number for number, (piece, _) in enumerate(vocab) if piece == eos), None)
