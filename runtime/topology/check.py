"""The checks of a topology's keys and values, without regard to where they were written."""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from llm_runtime.actors.errors import StartFailure
from llm_runtime.actors.registry import Registry
from llm_runtime.runtime.models import default_name
from llm_runtime.runtime.topology.positions import KeyPath
from llm_runtime.runtime.topology.schema import ROOT_CHILDREN, TABLES, Engine, Node, Topology, describe, fields_of

_ENGINE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)(?![0-9.]+$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+")


class Check:
    """The outcome of checking the data of a topology.

    Args:
        data: what the file and the arguments hold together.
        raw: texts of the values given as arguments: `--set ingress.api_key=123` means a string.
        base_of: where a relative path starts that is the value of a key.

    Attributes:
        problems: what is wrong with which key.
        topology: None if there are problems.
    """

    def __init__(self, data: dict[str, Any], raw: dict[KeyPath, str], base_of: Callable[[KeyPath], Path]) -> None:
        self.problems: list[tuple[KeyPath, str]] = []
        self.topology: Topology | None = None
        self._raw = raw
        self._base_of = base_of
        self._array = isinstance(data.get("model"), list)
        self._known = known_keys(data)
        tables = {path: self._table(path, content) for path, content in self._tables(data).items()}
        if data.get("model", {}) in ({}, []):
            self._report(("model", "path"), 'missing; add path = "smollm2-135m-instruct" under [model]')
        models = [path for path in tables if path[0] == "model" and path[-1] != "sampling"]
        for path in models:
            if "path" not in tables[path] and "path" not in _content(data, path) and data["model"]:
                self._report((*path, "path"), f'missing; add path = "smollm2-135m-instruct" under {self._header}')
        if not data.get("engine"):
            self._report(("engine",), "missing; add a table [engine.main], which may be empty")
        if not self.problems:
            engines, nodes = (
                {path[1]: values for path, values in tables.items() if len(path) == 2 and path[0] == family}
                for family in ("engine", "node")
            )
            others = {path[0]: values for path, values in tables.items() if len(path) == 1 and path not in models}
            samplings = [tables.get((*path, "sampling"), {}) for path in models]
            written = {"models": [tables[path] for path in models], "samplings": samplings, "array": self._array}
            topology = msgspec.convert({**others, **written, "engine": engines, "nodes": nodes}, Topology)
            topology = self._named(topology)
            self._cross_check(topology)
            self.topology = None if self.problems else topology

    def _report(self, path: KeyPath, problem: str) -> None:
        self.problems.append((path, problem))

    def _tables(self, data: dict[str, Any]) -> dict[KeyPath, dict[str, Any]]:
        """The known tables by path; reports everything else at the top of the file."""
        tables: dict[KeyPath, dict[str, Any]] = {}
        for name, content in data.items():
            if name not in TABLES and name != "engine":
                self._report((name,), "unknown table" + _nearest_table(name))
            elif name == "model" and isinstance(content, list) and all(isinstance(each, dict) for each in content):
                for index, each in enumerate(content):
                    tables |= _model_tables(("model", str(index)), each)
            elif not isinstance(content, dict):
                self._report(
                    (name,), f"is {_toml(content)}; write a table [{name if name in TABLES else 'engine.main'}]"
                )
            elif name == "node":
                machines = _machines(content)
                tables[(name,)] = {key: value for key, value in content.items() if key not in machines}
                tables |= {("node", node): keys for node, keys in machines.items() if self._is_node(node)}
            elif name == "model":
                tables |= _model_tables((name,), content)
            elif name in TABLES:
                tables[(name,)] = content
            else:
                tables |= {
                    ("engine", engine): keys for engine, keys in content.items() if self._is_engine(engine, keys)
                }
        return tables

    @property
    def _header(self) -> str:
        return "[[model]]" if self._array else "[model]"

    def _named(self, topology: Topology) -> Topology:
        """Fills in the names by which models of an array are served."""
        if not self._array:
            return topology
        names = [self._name_of(topology, index) for index in range(len(topology.models))]
        models = [structs.replace(model, served_name=name) for model, name in zip(topology.models, names, strict=True)]
        return structs.replace(topology, models=models)

    def _name_of(self, topology: Topology, index: int) -> str:
        model = topology.models[index]
        key = tuple(topology.model_key(index, "path").split("."))
        return model.served_name or default_name(model.path, self._base_of(key))

    def _is_engine(self, name: str, content: Any) -> bool:
        path = ("engine", name)
        if not isinstance(content, dict):
            self._report(path, "the keys of an engine stand under its name; write [engine.main] above it")
        elif not _ENGINE_NAME.fullmatch(name):
            self._report(path, "an engine's name has lower-case letters, digits, '_' and '-', and starts with a letter")
        elif name.rstrip("0123456789") in (*ROOT_CHILDREN, *(["model"] if self._array else [])):
            self._report(path, "the name is taken by another process; choose another, such as engine.main")
        else:
            return True
        return False

    def _is_node(self, name: str) -> bool:
        if not _NODE_NAME.fullmatch(name):
            self._report(("node", name), "a node's name has up to 32 letters, digits, '_' and '-'")
            return False
        return True

    def _table(self, path: KeyPath, content: dict[str, Any]) -> dict[str, Any]:
        """The checked values of one table; reports the others."""
        if path[0] == "model":
            table = TABLES["model.sampling" if path[-1] == "sampling" else "model"]
        else:
            table = TABLES[path[0] if len(path) == 1 else f"{path[0]}.NAME"]
        infos, hints = fields_of(table), typing.get_type_hints(table, include_extras=True)
        values: dict[str, Any] = {}
        for key, value in content.items():
            where = (*path, key)
            if key not in infos:
                self._report(where, "unknown key" + did_you_mean(where, self._known))
                continue
            raw = self._raw.get(where) if not isinstance(value, str) else None
            candidates = (value,) if raw is None else (value, raw)
            converted = _first_valid(candidates, hints[key])
            if converted is None:
                given = "" if key.endswith("api_key") else f"is {_toml(value)}; "  # keys do not belong into logs
                self._report(where, f"{given}give {describe(infos[key].type)}")
            else:
                values[key] = converted
                if problem := _problem_of_name(infos[key].type, converted):
                    self._report(where, problem)
        for key, info in infos.items():
            if info.required and key not in content and len(path) == 2 and path[0] != "model":
                self._report((*path, key), f"missing; give {describe(info.type)}")
        return values

    def _cross_check(self, topology: Topology) -> None:
        self._check_models(topology)
        for index in range(len(topology.models)):
            engines = topology.engines_of(index)
            for name, engine in engines.items():
                self._check_engine(("engine", name), engine, topology, index)
            self._check_roles(engines, topology)
        for name, engine in topology.engine.items():
            self._check_node(("engine", name, "node"), engine.node, topology)
        self._check_transfer(topology)
        self._check_node(("ingress", "node"), topology.ingress.node, topology)
        for name, machine in topology.nodes.items():
            if not _is_host(machine.address):
                self._report(
                    ("node", name, "address"),
                    f"is {_toml(machine.address)}; give the IP address or host name at which the other machines reach "
                    "this one, such as 10.0.0.2",
                )
        if len(topology.nodes) > 1 and topology.transport.keys is None:
            self._report(
                ("transport", "keys"),
                "missing; machines talk only under keys: run `runtime keygen transport.keys`, copy the file to each "
                'machine, and add keys = "transport.keys" under [transport]',
            )

    def _check_models(self, topology: Topology) -> None:
        """Each model has a name and an engine of its own, each engine a model."""
        if not self._array and all(engine.model is None for engine in topology.engine.values()):
            return
        names = [self._name_of(topology, index) for index in range(len(topology.models))]
        known = " or ".join(f'"{name}"' for name in dict.fromkeys(names))
        for index, name in enumerate(names):
            if name in names[:index]:
                self._report(
                    ("model", str(index), "served_name"),
                    f'is "{name}", and so is that of model.{names.index(name)}; give another',
                )
        for name, engine in topology.engine.items():
            if engine.model is None and len(names) > 1:
                self._report(("engine", name, "model"), f"missing; give {known}")
            elif engine.model is not None and engine.model not in names:
                self._report(("engine", name, "model"), f"is {_toml(engine.model)}, which is not served; give {known}")
        for index, name in enumerate(names):
            if not topology.engines_of(index):
                self._report(
                    ("model", str(index)),
                    f'"{name}" has no engine; add a table [engine.NAME] with model = "{name}", or remove the model',
                )

    def _check_roles(self, engines: dict[str, Engine], topology: Topology) -> None:
        """A model's prefill and decode engines need each other, and exchange pages of one form."""
        of_model = " of its model" if len(topology.models) > 1 else ""
        apart = {name: engine for name, engine in engines.items() if engine.role != "unified"}
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            alone = [name for name, engine in apart.items() if engine.role == role]
            if alone and not any(engine.role == other for engine in apart.values()):
                self._report(
                    ("engine", alone[0], "role"),
                    f'is "{role}", and no engine{of_model} has the role "{other}"; add one, or give the role "unified"',
                )
        for key in ("page_size", "kv_dtype"):
            values = {name: getattr(engine, key) for name, engine in apart.items()}
            first = next(iter(values.items()), None)
            for name, value in values.items():
                if first is not None and value != first[1]:
                    self._report(
                        ("engine", name, key),
                        f"is {_toml(value)}, and engine.{first[0]}.{key} is {_toml(first[1])}; engines that exchange "
                        "pages need the same",
                    )
        first_node = next(iter(topology.nodes), None)
        nodes = {engine.node or first_node for engine in apart.values()}
        if len(nodes) > 1 and topology.transfer.engine == "shm":
            self._report(
                ("transfer", "engine"),
                'is "shm", which needs prefill and decode engines on one node; give "tcp", or remove the key',
            )

    def _check_transfer(self, topology: Topology) -> None:
        transfer = topology.transfer
        if transfer.protocol == "rdma" and transfer.engine != "mooncake":
            self._report(
                ("transfer", "protocol"),
                'is "rdma", which is for mooncake; give engine = "mooncake", or remove the key',
            )
        if transfer.device and transfer.protocol != "rdma" and transfer.engine != "nixl":
            self._report(("transfer", "device"), 'is for RDMA; give protocol = "rdma" with mooncake, or remove the key')

    def _check_node(self, path: KeyPath, node: str | None, topology: Topology) -> None:
        if node is not None and node not in topology.nodes:
            known = " or ".join(f'"{name}"' for name in topology.nodes)
            remedy = f"give {known}" if known else f'add address = "10.0.0.2" under [node.{node}], or remove the key'
            self._report(path, f"is {_toml(node)}, and there is no such node; {remedy}")

    def _check_engine(self, path: KeyPath, engine: Engine, topology: Topology, index: int) -> None:
        model = topology.models[index]
        limit = topology.model_key(index, "max_model_len")
        max_model_len = model.max_model_len
        if engine.role != "unified" and engine.device == "cuda":
            self._report(
                (*path, "device"),
                f'is "cuda", and engines of the role {engine.role} run on the CPU only so far; give "cpu", or the role '
                '"unified"',
            )
        if engine.device == "cuda" and model.dtype in ("int8", "int4"):
            self._report(
                tuple(topology.model_key(index, "dtype").split(".")),
                f'is "{model.dtype}", which is for the CPU, and {".".join(path)}.device is "cuda"; give "bfloat16"',
            )
        if engine.kv_tokens < engine.page_size:
            self._report(
                (*path, "kv_tokens"),
                f"is {engine.kv_tokens}, less than one page of {engine.page_size} tokens; "
                f"give at least {engine.page_size}, or lower {'.'.join(path)}.page_size",
            )
        elif max_model_len is not None and engine.kv_tokens < max_model_len:
            self._report(
                (*path, "kv_tokens"),
                f"is {engine.kv_tokens}, too small for one request of {limit} = {max_model_len} tokens; "
                f"give at least {max_model_len}, or lower {limit}",
            )


def known_keys(data: dict[str, Any]) -> list[KeyPath]:
    """All keys that a topology may hold, those of its own engines among them."""
    engines, nodes = (value if isinstance(value, dict) else {} for value in (data.get("engine"), data.get("node")))
    models = data.get("model")
    paths: dict[str, list[KeyPath]] = {
        "engine.NAME": [("engine", name) for name in engines],
        "node.NAME": [("node", name) for name in _machines(nodes)],
        **(
            {"model": [("model", str(index)) for index, each in enumerate(models) if isinstance(each, dict)]}
            if isinstance(models, list)
            else {"model": [("model",)]}
        ),
    }
    paths["model.sampling"] = [(*path, "sampling") for path in paths["model"]]
    return [
        (*path, key)
        for header, table in TABLES.items()
        for path in paths.get(header, [(header,)])
        for key in table.__struct_fields__
    ]


def _content(data: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """What stands in a model's table."""
    content: dict[str, Any] = data[path[0]] if len(path) == 1 else data[path[0]][int(path[1])]
    return content


def _model_tables(path: KeyPath, content: dict[str, Any]) -> dict[KeyPath, dict[str, Any]]:
    """A model's table, and the one inside it."""
    sampling = content.get("sampling")
    if not isinstance(sampling, dict):
        return {path: content}
    own = {key: value for key, value in content.items() if key != "sampling"}
    return {path: own, (*path, "sampling"): sampling}


def _machines(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables `[node.NAME]` among what stands under `node`."""
    return {name: keys for name, keys in node.items() if isinstance(keys, dict) and name not in Node.__struct_fields__}


def _is_host(text: str) -> bool:
    """Whether a text names one machine: a host name, or an IP address, but not that of all interfaces or of a group."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return _HOST_NAME.fullmatch(text) is not None
    return not address.is_unspecified and not address.is_multicast


def did_you_mean(path: KeyPath, known: Sequence[KeyPath]) -> str:
    """Names the known key that is most like an unknown one, in whole and in its last part."""

    def likeness(key: KeyPath) -> float:
        whole = difflib.SequenceMatcher(None, ".".join(key), ".".join(path)).ratio()
        return whole + difflib.SequenceMatcher(None, key[-1], path[-1]).ratio()

    best = max(known, key=likeness)
    return f"; did you mean {'.'.join(best)}?"


def _first_valid(candidates: Sequence[Any], hint: Any) -> Any:
    """The first candidate that is of a type, as a value of that type; None if there is none."""
    for candidate in candidates:
        try:
            value = msgspec.convert(candidate, hint)
        except msgspec.ValidationError:
            continue
        if not isinstance(value, float) or math.isfinite(value):
            return value
    return None


def _problem_of_name(info: msgspec.inspect.Type, name: Any) -> str:
    """Why a name of an implementation cannot be used; empty if it can, or if the key is no such name. Imports what
    another package has under that name."""
    match info:
        case msgspec.inspect.Metadata(extra={"registry": Registry() as registry}) if name not in registry.reserved:
            try:
                registry.get(name)
            except StartFailure as failure:
                return str(failure)
    return ""


def _nearest_table(name: str) -> str:
    nearest = difflib.get_close_matches(name, [header.partition(".")[0] for header in TABLES], 1, 0.0)[0]
    return f"; did you mean [{'engine.main' if nearest == 'engine' else nearest}]?"


def _toml(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
