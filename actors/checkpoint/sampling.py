"""What a checkpoint says about drawing from its model, for requests that do not say it themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from llm_runtime.actors.checkpoint.errors import CheckpointError
from llm_runtime.actors.checkpoint.gguf import GGUFFile
from llm_runtime.actors.checkpoint.json_file import read_json


class SamplingDefaults(Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of requests that do not give them; None leaves one to the API.

    Attributes:
        top_k: 0 keeps all tokens.
        max_tokens: most tokens of a chat's answer.
        max_repeats: an answer ends whose last tokens are the same run of tokens so many times.
    """

    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_repeats: Annotated[int, Meta(ge=2, lt=2**31)] | None = None


_OF_GGUF = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""llama.cpp's keys under `general.sampling.`."""
_OF_HUGGING_FACE = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}


def read_sampling_defaults(path: Path) -> SamplingDefaults:
    """What `generation_config.json` of a directory or the metadata of a GGUF file recommends.

    Raises CheckpointError for values that are none.
    """
    if path.is_dir():
        file = path / "generation_config.json"
        given: dict[str, Any] = read_json(file, dict[str, Any], empty={}) if file.exists() else {}
        names = _OF_HUGGING_FACE
        if given.get("do_sample") is False:  # the other values are of no effect then, and transformers says so
            given = {"temperature": 0.0, **{name: given.get(name) for name in ("repetition_penalty", "max_new_tokens")}}
    else:
        file, prefix = path, "general.sampling."
        metadata = GGUFFile(path).metadata
        given = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
        names = _OF_GGUF
    values = {names[name]: value for name, value in given.items() if name in names and value is not None}
    for name in ("top_k", "temperature"):
        if isinstance(values.get(name), int | float):
            values[name] = max(0, values[name])
    for name in ("top_k", "max_tokens"):
        if isinstance(values.get(name), float) and values[name].is_integer():
            values[name] = int(values[name])
    try:
        return msgspec.convert(values, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{file}: a recommended sampling parameter makes no sense ({error}): correct it there, or set defaults = "
            '"openai" under [model.sampling]'
        ) from None
