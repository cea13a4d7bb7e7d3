"""Keys of a topology as keyword arguments of a Python call."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.topology.schema import Engine, Model

_MODEL_KEYS = Model.__struct_fields__
_ENGINE_KEYS = Engine.__struct_fields__


def as_arguments(keys: Mapping[str, Any], dotted: Mapping[str, Any], file: Path | None) -> list[str]:
    """`--set` arguments.

    Args:
        keys: by their bare names: those of [model], and those of an engine, which go to each engine of the topology.
        dotted: by their full names, such as "engine.main.tp".
        file: the topology file, if there is one.

    Raises UserError for a name that neither table has.
    """
    arguments = []
    engines = _engines(file)
    for key, value in keys.items():
        if key in _MODEL_KEYS:
            arguments.append(f"model.{key}={_toml(value)}")
        elif key in _ENGINE_KEYS:
            arguments += [f"engine.{engine}.{key}={_toml(value)}" for engine in engines]
        else:
            near = get_close_matches(key, [*_MODEL_KEYS, *_ENGINE_KEYS], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no key {key} in [model] or [engine.NAME] of a topology{hint}")
    return arguments + [f"{key}={_toml(value)}" for key, value in dotted.items()]


def _engines(file: Path | None) -> Sequence[str]:
    if file is None:
        return ["main"]
    try:
        return list(tomllib.loads(file.read_text(encoding="utf-8"))["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the node says what is wrong with the file


def _toml(value: Any) -> str:
    """A string, number or truth value; they are written in TOML as in JSON."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{value!r} is no value of a topology's key: give a string, a number or a truth value")
    return json.dumps(value, ensure_ascii=False)
