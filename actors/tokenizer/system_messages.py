"""System messages in the middle of a conversation, for chat templates that know them at its beginning only.

Agents add instructions as they go. A template may put such a message where it stands, refuse it, drop it, or move it to
the beginning, where it would change the prompt before everything that is cached. What a template does is found by
trying; for one that does not put it where it stands, its text becomes a part of the message before it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

Messages = list[dict[str, Any]]

_INSTRUCTION = "Echo inline instruction"
_PROBE: Messages = [
    {"role": "system", "content": "Alpha leading instruction"},
    {"role": "user", "content": "Bravo first question"},
    {"role": "assistant", "content": "Charlie first answer"},
    {"role": "user", "content": "Delta second question"},
]


def has_late_system(messages: Messages) -> bool:
    """Whether a system message is not the first message."""
    return any(message.get("role") == "system" for message in messages[1:])


def takes_late_system(render: Callable[[Messages], str]) -> bool:
    """Whether a template puts system messages where they stand.

    Args:
        render: raises any exception for what the template refuses.
    """
    try:
        plain = render(_PROBE)
        return all(_stays(plain, render(_inserted(at)), _PROBE[at - 1]["content"]) for at in (2, len(_PROBE)))
    except Exception:
        return False


def _inserted(at: int) -> Messages:
    return [*_PROBE[:at], {"role": "system", "content": _INSTRUCTION}, *_PROBE[at:]]


def _stays(plain: str, changed: str, before: str) -> bool:
    """Whether a prompt is the plain one with the instruction put in somewhere behind a message, before the end."""
    head = _common(plain, changed)
    tail = _common(plain[::-1], changed[::-1])
    return (
        changed.count(_INSTRUCTION) == 1
        and head + tail >= len(plain)
        and head < len(plain)
        and plain.index(before) + len(before) <= head
    )


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def folded(messages: Messages) -> Messages:
    """The conversation with the texts of its system messages, but the first, in the messages next to them.

    A text goes to the end of a message of the user or of a tool before it, so that what comes first is as it was in the
    request before. Behind an answer it opens the next message of the user.
    """
    result: Messages = []
    pending: list[str] = []
    for place, message in enumerate(messages):
        role = message.get("role")
        if role == "system" and place:
            text = _text(message.get("content"))
            if result and result[-1].get("role") in ("user", "tool") and not pending:
                result[-1] = {**result[-1], "content": _with(result[-1].get("content"), text, at_end=True)}
            else:
                pending.append(text)
            continue
        if pending:
            text = "\n\n".join(pending)
            pending = []
            if role == "user":
                message = {**message, "content": _with(message.get("content"), text, at_end=False)}
            else:
                result.append({"role": "user", "content": text})
        result.append(message)
    if pending:
        result.append({"role": "user", "content": "\n\n".join(pending)})
    return result


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return str(content or "")


def _with(content: Any, text: str, at_end: bool) -> Any:
    if isinstance(content, list):
        part = {"type": "text", "text": text}
        return [*content, part] if at_end else [part, *content]
    texts = [str(content or ""), text]
    return "\n\n".join(each for each in (texts if at_end else texts[::-1]) if each)
