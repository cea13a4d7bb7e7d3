"""The JSON files of a model directory."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import msgspec

from actors.checkpoint.errors import CheckpointError


def read_json(path: Path, kind: Any, empty: Any = None) -> Any:
    """A file's content as a value of type `kind`; a byte order mark before it counts for nothing.

    Args:
        empty: what a file without a word stands for; None refuses it.

    Raises CheckpointError.
    """
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).strip()
        return msgspec.json.decode(text, type=kind) if text or empty is None else empty
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
