"""Tools whose input Anthropic has defined and which clients run: shell, text editor and memory.

A client sends their type alone, for Anthropic's models know them. Other models are told here what the input is, as in
https://platform.claude.com/docs/en/agents-and-tools/tool-use.
"""

from __future__ import annotations

import re
from typing import Any

from llm_runtime.actors.ingress.openai.tools import Function, Tool

_TYPE = re.compile(r"(bash|text_editor|memory)_\d{8}")


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_RANGE = {
    "type": "array",
    "items": {"type": "integer"},
    "minItems": 2,
    "maxItems": 2,
    "description": "For view: the first and the last line to show. -1 is the last line of the file.",
}
_EDITS: dict[str, Any] = {
    "path": _text("The file or directory."),
    "view_range": _RANGE,
    "file_text": _text("For create: the text of the new file."),
    "old_str": _text("For str_replace: the text to replace. It must occur exactly once."),
    "new_str": _text("For str_replace: the text in its place."),
    "insert_line": {
        "type": "integer",
        "description": "For insert: the line to insert after; 0 is the beginning.",
    },
    "insert_text": _text("For insert: the text to insert."),
}


def _commands(*commands: str) -> dict[str, Any]:
    return {"command": {"enum": list(commands), "description": "What to do."}}


_TOOLS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "bash": (
        "bash",
        "Runs commands in a shell that stays open between calls.",
        {
            "command": _text("The command to run. Required unless the shell is restarted."),
            "restart": {"type": "boolean", "description": "Whether to restart the shell."},
        },
        [],
    ),
    "text_editor": (
        "str_replace_based_edit_tool",
        "Views and edits text files.",
        {**_commands("view", "create", "str_replace", "insert"), **_EDITS},
        ["command", "path"],
    ),
    "memory": (
        "memory",
        "Keeps notes as files under /memories, which last beyond this conversation.",
        {
            **_commands("view", "create", "str_replace", "insert", "delete", "rename"),
            **_EDITS,
            "old_path": _text("For rename: the present path."),
            "new_path": _text("For rename: the new path."),
        },
        ["command"],
    ),
}


def definition_of(raw: dict[str, Any]) -> Tool | None:
    """The definition that a client's tool stands for; None if it is none of these."""
    match = _TYPE.fullmatch(str(raw.get("type")))
    if match is None:
        return None
    name, description, properties, required = _TOOLS[match[1]]
    given = raw.get("name")
    parameters = {"type": "object", "properties": properties, "required": required}
    # Former versions of the editor have another name.
    return Tool("function", Function(given if given == "str_replace_editor" else name, description, parameters))
