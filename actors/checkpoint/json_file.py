"""The JSON files of a model directory."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import msgspec

from llm_runtime.actors.checkpoint.errors import CheckpointError


def read_json(path: Path, kind: Any, empty: Any = None) -> Any:
    """A file's content as a value of type `kind`; a byte order mark before it counts for nothing, and NaN and Infinity
    are numbers, as to Python, which writes them.

    Args:
        empty: what a file without a word stands for; None refuses it.

    Raises CheckpointError.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(path, text, kind, empty)


def parse_json(path: Path, text: bytes, kind: Any, empty: Any = None) -> Any:
    """What has been read of a file, as above."""
    text = text.removeprefix(codecs.BOM_UTF8).strip()
    if not text and empty is not None:
        return empty
    try:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if b"NaN" not in text and b"Infinity" not in text:
                raise
            return msgspec.convert(json.loads(text), kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
