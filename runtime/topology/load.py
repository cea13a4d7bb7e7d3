"""From a topology file and `--set` arguments to a checked `Topology`; errors say where, which key and what to do."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.shipped import topologies
from llm_runtime.runtime.topology.check import Check, did_you_mean, known_keys
from llm_runtime.runtime.topology.positions import KeyPath, key_lines
from llm_runtime.runtime.topology.schema import Topology


class TopologyError(UserError):
    """A topology that cannot be used. The text has a line for each error, which begins with its place."""

    source = ""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class LoadedTopology:
    """A topology with the places its keys come from, for errors that show only later.

    Attributes:
        topology: the checked tables.
        file: the topology file.
    """

    def __init__(self, topology: Topology, file: Path, sources: _Sources) -> None:
        self.topology = topology
        self.file = file
        self._sources = sources

    def error(self, key: str, problem: str) -> TopologyError:
        """An error about a key such as "engine.main.tp"."""
        return TopologyError([f"{self._sources.where(tuple(key.split('.')))}: {key}: {problem}"])

    def is_given(self, key: str) -> bool:
        """Whether a key is written in the file or given as an argument."""
        path = tuple(key.split("."))
        return path in self._sources.arguments or path in self._sources.lines

    def base_of(self, key: str) -> Path:
        """Where a relative path in a key starts: beside the file, or the current directory for `--set`."""
        return self._sources.base_of(tuple(key.split(".")))


def load_topology(file: Path, settings: Sequence[str] = (), port: int | None = None) -> LoadedTopology:
    """Reads and checks a topology.

    Args:
        settings: `--set` arguments, "KEY=VALUE"; later ones win over earlier ones and over the file.
        port: the `--port` argument.

    Raises TopologyError.
    """
    data, lines = _read(file)
    arguments: dict[KeyPath, str] = {}
    errors: list[str] = []
    raw: dict[KeyPath, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        origin = f"--set {setting}"
        problem = _cannot_set(path, known_keys(data)) if equals else "give KEY=VALUE, such as engine.main.tp=2"
        if problem:
            errors.append(f"{origin}: {'.'.join(path)}: {problem}")
            continue
        arguments[path] = origin
        raw[path] = text
        _put(data, path, _parse(text))
    sources = _Sources(file, lines, arguments)
    if port is not None:
        problems = Check(data, raw, sources.base_of).problems
        replaced = [(path, problem) for path, problem in problems if path == ("ingress", "port")]
        errors += [f"{sources.where(path)}: {'.'.join(path)}: {problem}" for path, problem in replaced]
        arguments["ingress", "port"] = f"--port {port}"
        _put(data, ("ingress", "port"), port)
    check = Check(data, raw, sources.base_of)
    errors += [f"{sources.where(path)}: {'.'.join(path)}: {problem}" for path, problem in check.problems]
    if errors or check.topology is None:
        raise TopologyError(errors)
    return LoadedTopology(check.topology, file, sources)


class _Sources:
    """Where keys come from: lines of the file, or arguments that replace them."""

    def __init__(self, file: Path, lines: dict[KeyPath, int], arguments: dict[KeyPath, str]) -> None:
        self.file = file
        self.lines = lines
        self.arguments = arguments

    def base_of(self, path: KeyPath) -> Path:
        """Where a relative path starts that is the value of a key."""
        return Path.cwd() if path in self.arguments else self.file.resolve().parent

    def where(self, path: KeyPath) -> str:
        """The argument, or file and line, of a key; of the table around it where the key itself is not written."""
        if path in self.arguments:
            return self.arguments[path]
        while path:
            if path in self.lines:
                return f"{self.file}:{self.lines[path]}"
            path = path[:-1]
        return f"{self.file}:1"


def _read(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = ", ".join(topologies())
        raise TopologyError([f"{file}: no such file, and none that comes with the runtime ({names})"]) from None
    except UnicodeDecodeError:
        raise TopologyError([f"{file}: not UTF-8 text; a topology is a TOML file"]) from None
    except OSError as error:
        raise TopologyError([f"{file}: cannot be read: {error.strerror}"]) from None
    try:
        return tomllib.loads(text), key_lines(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        position = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = text.count("\n") + 1
        if position is not None:
            message = message[: position.start()]
            line = int(position[1]) if position[1] else line
        raise TopologyError([f"{file}:{line}: not valid TOML: {message}"]) from None


def _parse(text: str) -> Any:
    """The value of a `--set` argument: TOML, or else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _put(data: Any, path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        inner = data[int(part)] if isinstance(data, list) else data.get(part)
        if not isinstance(inner, dict) and not (part == "model" and isinstance(inner, list)):
            inner = data[part] = {}
        data = inner
    data[path[-1]] = value


def _cannot_set(path: KeyPath, known: Sequence[KeyPath]) -> str:
    """Why an argument cannot set this key; empty if it can."""
    if path in known:
        return ""
    inside = [key for key in known if key[: len(path)] == path]
    if inside:
        return f"is a table; set one of its keys, such as {'.'.join(inside[0])}"
    return "unknown key" + did_you_mean(path, known)
