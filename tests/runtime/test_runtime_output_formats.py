"""The formats of tool calls and reasoning that a node's ingress is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_runtime.actors.parsers.reasoning import FORMATS as REASONING
from llm_runtime.actors.parsers.registry import Formats
from llm_runtime.actors.parsers.tool_calls import FORMATS as CALLS
from llm_runtime.runtime.output_formats import chat_template_source, output_formats
from llm_runtime.runtime.plan import plan_node
from llm_runtime.runtime.topology import TopologyError, load_topology

QWEN = "<|im_start|>{% if enable_thinking %}<think>{% endif %}<tool_call>"
TEMPLATE = "model.chat_template=qwen.jinja"


def formats(directory: Path, *settings: str) -> dict[str, str | None]:
    """Those of a node with the embedded model, whose template knows neither tools nor reasoning."""
    file = directory / "node.toml"
    file.write_text('[model]\npath = "smollm2-135m-instruct"\n[engine.main]\n')
    plan = plan_node(load_topology(file, settings))
    return output_formats(plan.models[0], plan.topology.ingress)


@pytest.mark.parametrize(("key", "registry"), [("tool_call_parser", CALLS), ("reasoning_parser", REASONING)])
def test_every_format_can_be_chosen(tmp_path: Path, key: str, registry: Formats[Any]) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[model]\npath = "m"\n[engine.main]\n')
    for name in ("auto", "none", *registry.names):
        assert getattr(load_topology(file, [f"ingress.{key}={name}"]).topology.ingress, key) == name
    with pytest.raises(TopologyError) as raised:
        load_topology(file, [f"ingress.{key}=hermess"])
    place, sentence = str(raised.value).split("; give one of ")
    assert place == f'--set ingress.{key}=hermess: ingress.{key}: there is no {registry.kind} "hermess"'
    assert sentence.split(", ") == [f'"{name}"' for name in ("auto", "none", *registry.names)]


def test_formats_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen.jinja").write_text(QWEN)
    assert formats(tmp_path) == {"tool_call_parser": None, "reasoning_parser": None}
    given = formats(tmp_path, "ingress.tool_call_parser=llama3", "ingress.reasoning_parser=qwen3")
    assert given == {"tool_call_parser": "llama3", "reasoning_parser": "qwen3"}
    assert formats(tmp_path, TEMPLATE) == {"tool_call_parser": "qwen25", "reasoning_parser": "qwen3"}
    given = formats(tmp_path, TEMPLATE, "ingress.tool_call_parser=none", "ingress.reasoning_parser=deepseek-r1")
    assert given == {"tool_call_parser": None, "reasoning_parser": "deepseek-r1"}


def test_templates_of_a_directory(tmp_path: Path) -> None:
    assert chat_template_source(tmp_path) == ""
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}))
    assert chat_template_source(tmp_path) == "A"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "A"}, {"template": "B"}]}))
    assert chat_template_source(tmp_path) == "A\nB"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert chat_template_source(tmp_path).startswith("C\n")
    for broken in ("{", "[]", "5", "\xff"):
        config.write_bytes(broken.encode("latin-1"))
        assert chat_template_source(tmp_path) in ("", "C")
    assert chat_template_source(tmp_path / "nothing.gguf") == ""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    assert chat_template_source(tmp_path / "broken.gguf") == ""
