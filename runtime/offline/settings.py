"""Keys of a topology as keyword arguments of a Python call."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llm_runtime.actors.scheduler.drafters import DRAFTERS
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.topology.schema import Engine, Ingress, Model, Node

_MODEL_KEYS = Model.__struct_fields__
_ENGINE_KEYS = Engine.__struct_fields__
_OTHER_NAMES = {
    "tensor_parallel_size": "tp",
    "tp_size": "tp",
    "context_length": "max_model_len",
    "served_model_name": "served_name",
    "max_num_seqs": "max_running",
    "max_running_requests": "max_running",
    "max_queued_requests": "max_queue",
    "max_num_batched_tokens": "chunk_tokens",
    "chunked_prefill_size": "chunk_tokens",
    "max_total_tokens": "kv_tokens",
    "block_size": "page_size",
    "kv_cache_dtype": "kv_dtype",
    "enable_prefix_caching": "prefix_cache",
    "enable_deterministic_inference": "deterministic",
    "schedule_policy": "policy",
}
"""vLLM's and SGLang's names of keys."""
_SPECULATION = "give speculation=NAME, which is one of " + ", ".join((*DRAFTERS.reserved, *DRAFTERS.names))
_INSTEAD = {
    "gpu_memory_utilization": "give kv_tokens=N, the tokens that the KV pool holds",
    "mem_fraction_static": "give kv_tokens=N, the tokens that the KV pool holds",
    "seed": "give SamplingParams(seed=N)",
    "random_seed": "give SamplingParams(seed=N)",
    "quantization": 'give dtype="int8" or dtype="int4"',
    "disable_radix_cache": "give prefix_cache=False",
    "disable_overlap_schedule": "give run_ahead=False",
    "speculative_algorithm": _SPECULATION,
    "speculative_config": _SPECULATION,
    "tokenizer": "the tokenizer is the one in the model's directory",
    "tokenizer_path": "the tokenizer is the one in the model's directory",
    "trust_remote_code": "code of a checkpoint is never run",
    "enforce_eager": "graphs are used where they give the same bits; there is no switch",
    "data_parallel_size": "give topology=FILE with several engines",
    "dp_size": "give topology=FILE with several engines",
    "swap_space": "there is none: a request that has to wait keeps its tokens",
}
"""What to do in place of arguments of vLLM and SGLang that have no equal here."""
_NEUTRAL = {
    "trust_remote_code": False,
    "enforce_eager": False,
    "disable_radix_cache": False,
    "disable_overlap_schedule": False,
    "data_parallel_size": 1,
    "dp_size": 1,
    "swap_space": 0,
}
"""Values of those that ask for nothing."""


def key_of_option(option: str) -> str:
    """The key of a topology with one engine that does what an option of other servers does, or that was meant by an
    option of its name; empty if there is none."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    name = {**_OTHER_NAMES, "model": "path"}.get(name, name)
    tables = (("model", Model), ("engine.main", Engine), ("ingress", Ingress), ("node", Node))
    return next((f"{table}.{name}" for table, kind in tables if name in kind.__struct_fields__), "")


def as_arguments(keys: Mapping[str, Any], dotted: Mapping[str, Any], file: Path | None) -> list[str]:
    """`--set` arguments.

    Args:
        keys: by their bare names: those of [model], and those of an engine, which go to each engine of the topology.
            Names that vLLM and SGLang have for them are understood.
        dotted: by their full names, such as "engine.main.tp".
        file: the topology file, if there is one.

    Raises UserError for a name that neither table has.
    """
    arguments = []
    engines = _engines(file)
    for given, value in keys.items():
        key = _OTHER_NAMES.get(given, given)
        if key != given and key in keys:
            raise UserError(f"{given} is another name of {key}: give one of them")
        if key in _INSTEAD and (value is None or (key in _NEUTRAL and value == _NEUTRAL[key])):
            continue
        if key in _MODEL_KEYS:
            arguments.append(f"model.{key}={_toml(value)}")
        elif key in _ENGINE_KEYS:
            arguments += [f"engine.{engine}.{key}={_toml(value)}" for engine in engines]
        elif key in _INSTEAD:
            raise UserError(f"there is no argument {key}: {_INSTEAD[key]}")
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
