"""Packages that cannot be used are refused by their entry point; those that nobody names are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from extending_node import Node
from extending_packages import install

from llm_runtime.actors.errors import StartFailure
from llm_runtime.actors.parsers.reasoning import FORMATS as REASONING_FORMATS
from llm_runtime.actors.parsers.tool_calls import FORMATS as TOOL_CALL_FORMATS
from llm_runtime.actors.registry import Registry
from llm_runtime.actors.scheduler.drafters import DRAFTERS
from llm_runtime.actors.scheduler.policies import POLICIES
from llm_runtime.runtime.topology import LoadedTopology, TopologyError, load_topology

NODE = '[model]\npath = "smollm2-135m-instruct"\n[engine.main]\n'
CODE = """
from llm_runtime.actors.parsers.reasoning.base import ReasoningParser
from llm_runtime.actors.parsers.tool_calls.base import ToolCallParser
from llm_runtime.actors.scheduler.drafters.base import Drafter

class NoReader(ToolCallParser):
    MARKERS = ("@",)

class NoMarkers(ToolCallParser):
    def read_calls(self, marker):
        yield

class NoArgument(ReasoningParser):
    def __init__(self):
        super().__init__(False)

class NoGuess(Drafter):
    def __init__(self, tokens, config): ...
    def follow(self): ...

def of_one(waiting):
    return waiting
"""
KEYS: dict[str, Registry[Any]] = {
    "ingress.tool_call_parser": TOOL_CALL_FORMATS,
    "ingress.reasoning_parser": REASONING_FORMATS,
    "engine.main.policy": POLICIES,
    "engine.main.speculation": DRAFTERS,
}


def load(directory: Path, *settings: str) -> LoadedTopology:
    file = directory / "node.toml"
    file.write_text(NODE)
    return load_topology(file, settings)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("ingress.tool_call_parser", "no_module:X", "ModuleNotFoundError: No module named 'no_module'"),
        ("ingress.tool_call_parser", "odd:X", "AttributeError: module 'odd' has no attribute 'X'"),
        (
            "ingress.tool_call_parser",
            "odd:NoGuess",
            "it is not a subclass of llm_runtime.actors.parsers.tool_calls.base.ToolCallP",
        ),
        (
            "ingress.tool_call_parser",
            "odd:NoReader",
            "it lacks read_calls of llm_runtime.actors.parsers.tool_calls.base.ToolCallP",
        ),
        (
            "ingress.tool_call_parser",
            "odd:NoMarkers",
            "it lacks MARKERS of llm_runtime.actors.parsers.tool_calls.base.ToolCallPar",
        ),
        ("ingress.reasoning_parser", "odd:NoArgument", "it cannot be called with (inside)"),
        ("engine.main.policy", "odd:of_one", "it cannot be called with (waiting, tree)"),
        ("engine.main.policy", "odd:__name__", "it cannot be called with (waiting, tree)"),
        (
            "engine.main.speculation",
            "odd:NoGuess",
            "it lacks chances, guess of llm_runtime.actors.scheduler.drafters.base.Drafter",
        ),
    ],
)
def test_what_a_package_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, problem: str
) -> None:
    registry = KEYS[key]
    install(tmp_path, "odd", CODE, registry.group, strange=value)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TopologyError) as raised:
        load(tmp_path, f"{key}=strange")
    assert str(raised.value).startswith(
        f'--set {key}=strange: {key}: the {registry.kind} "strange" cannot be used: the entry point '
        f'"strange = {value}" in [{registry.group}] of odd 1: {problem}'
    )


@pytest.mark.parametrize("key", KEYS)
def test_a_package_that_nobody_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    registry, own = KEYS[key], KEYS[key].names[0]
    install(tmp_path, "idle", "raise SystemError('imported')", registry.group, idle="idle:X", **{own: "idle:X"})
    monkeypatch.syspath_prepend(tmp_path)
    for setting in ((), (f"{key}={own}",), (f"{key}={registry.reserved[0]}",) if registry.reserved else ()):
        load(tmp_path, *setting)
    with pytest.raises(TopologyError, match=f'there is no {registry.kind} "idel"; give one of .*"{own}".*"idle"$'):
        load(tmp_path, f"{key}=idel")
    with pytest.raises(TopologyError, match=r"of idle 1: SystemError: imported$"):
        load(tmp_path, f"{key}=idle")


def test_an_actor_refuses_to_start_with_a_name_that_is_gone() -> None:
    for registry in KEYS.values():
        with pytest.raises(StartFailure, match=f'there is no {registry.kind} "gone"; give one of "'):
            registry.get("gone")


def test_check_and_up_end_with_one_sentence(model: str, tmp_path: Path) -> None:
    install(tmp_path, "odd", "import nothing_of_that_name", POLICIES.group, strange="odd:order")
    (tmp_path / "node.toml").write_text(f'{NODE}policy = "strange"\n')
    node = Node(tmp_path)
    for command in ("check", "up"):
        ended = node.run(command, str(tmp_path / "node.toml"))
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert 'node.toml:4: engine.main.policy: the waiting policy "strange" cannot be used: ' in line
        assert '"strange = odd:order" in [llm_runtime.waiting_policies] of odd 1: ModuleNotFoundError: ' in line
