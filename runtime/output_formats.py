"""In which formats a model calls tools and reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.checkpoint.gguf import GGUFFile
from llm_runtime.actors.parsers.reasoning import detect_reasoning
from llm_runtime.actors.parsers.tool_calls import detect_tool_calls
from llm_runtime.runtime.model_plan import ModelPlan
from llm_runtime.runtime.topology import Ingress


def output_formats(plan: ModelPlan, ingress: Ingress) -> dict[str, str | None]:
    """What the ingress is told of a model, `tool_call_parser` and `reasoning_parser`; None for an unknown format."""
    given = {"tool_call_parser": ingress.tool_call_parser, "reasoning_parser": ingress.reasoning_parser}
    found: dict[str, str | None] = {key: None if value == "none" else value for key, value in given.items()}
    if "auto" in given.values():
        template = chat_template_source(plan.model.path, plan.chat_template)
        detected = {"tool_call_parser": detect_tool_calls(template), "reasoning_parser": detect_reasoning(template)}
        found |= {key: detected[key] for key, value in given.items() if value == "auto"}
    return found


def chat_template_source(model: Path, replaced_by: Path | None = None) -> str:
    """All chat templates of a model, empty if there are none. What is wrong with a file that cannot be read is left to
    the tokenizer to say."""
    try:
        if replaced_by is not None:
            return replaced_by.read_text("utf-8-sig")
        if model.is_dir():
            return _of_directory(model)
        template = GGUFFile(model).metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else ""
    except (OSError, ValueError, RecursionError, CheckpointError):
        return ""


def _of_directory(path: Path) -> str:
    files = [path / "chat_template.jinja", *sorted((path / "additional_chat_templates").glob("*.jinja"))]
    templates = [file.read_text("utf-8-sig") for file in files if file.is_file()]
    settings = path / "tokenizer_config.json"
    config: Any = json.loads(settings.read_text("utf-8-sig")) if settings.is_file() else {}
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, str):
        templates.append(template)
    elif isinstance(template, list):
        templates += [str(each.get("template")) for each in template if isinstance(each, dict)]
    return "\n".join(templates)
