"""`context_management`: what is left out of a conversation before the model sees it.

Each edit is a function of the messages, so an answer that is made anew is made of the same conversation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from msgspec import structs

from llm_runtime.actors.ingress.anthropic.protocol import (
    Block,
    ClearThinking,
    ClearToolUses,
    InputTokens,
    Message,
    Text,
    Thinking,
    ThinkingTurns,
    ToolResult,
    ToolUse,
)

CLEARED = "[This result was removed to save context.]"

Messages = list[Message]
Count = Callable[[Messages], Awaitable[int]]
"""How many tokens the prompt of a conversation has."""


class Edited:
    """A conversation and what was done to it.

    Attributes:
        applied: `applied_edits` of the answer.
        tokens: how many the conversation had before; None where that was not needed.
    """

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.applied: list[dict[str, Any]] = []
        self.tokens: int | None = None


async def edited(messages: Messages, edits: Sequence[Any], count: Count, at_most: int) -> Edited:
    """Applies edits in their order. Raises ApiError where the conversation cannot be tokenized.

    Args:
        count: asked only where an edit depends on the number of tokens, or has changed something.
        at_most: tokens that the conversation cannot have more of.
    """
    result = Edited(messages)
    before: int | None = None
    for edit in edits:
        match edit:
            case ClearThinking():
                changed, cleared = _without_thinking(result.messages, edit)
                report = "cleared_thinking_turns"
            case ClearToolUses():
                trigger = edit.trigger
                if isinstance(trigger, InputTokens):
                    if at_most <= trigger.value:
                        continue
                    if before is None:
                        before = await count(result.messages)
                        result.tokens = before if result.tokens is None else result.tokens
                    if before <= trigger.value:
                        continue
                elif sum(isinstance(block, ToolUse) for block in _blocks(result.messages)) <= trigger.value:
                    continue
                changed, cleared = _without_results(result.messages, edit)
                report = "cleared_tool_uses"
            case _:
                continue
        if not cleared:
            continue
        if before is None:
            before = await count(result.messages)
            result.tokens = before if result.tokens is None else result.tokens
        after = await count(changed)
        least = edit.clear_at_least if isinstance(edit, ClearToolUses) else None
        if least is not None and before - after < least.value:
            continue
        kind = str(edit.__struct_config__.tag)
        result.applied.append({"type": kind, report: cleared, "cleared_input_tokens": max(0, before - after)})
        result.messages, before = changed, after
    return result


def _blocks(messages: Messages) -> list[Block]:
    return [block for message in messages if isinstance(message.content, list) for block in message.content]


def _without_thinking(messages: Messages, edit: ClearThinking) -> tuple[Messages, int]:
    """The conversation with the reasoning of the last turns alone, and of how many turns it has gone.

    What the assistant says between two messages of the user is one turn; results of calls do not end it.
    """
    if not isinstance(edit.keep, ThinkingTurns):
        return messages, 0
    turn, turns = 0, []
    thinking: dict[int, None] = {}  # an ordered set
    for message in messages:
        if message.role == "user" and not _only_results(message):
            turn += 1
        turns.append(turn)
        if message.role == "assistant" and any(isinstance(each, Thinking) for each in message.content or ()):
            thinking[turn] = None
    old = list(thinking)[: -edit.keep.value]
    return [
        _replaced(message, [block for block in message.content if not isinstance(block, Thinking)])
        if at in old and isinstance(message.content, list)
        else message
        for message, at in zip(messages, turns, strict=True)
    ], len(old)


def _only_results(message: Message) -> bool:
    blocks = message.content
    return isinstance(blocks, list) and bool(blocks) and all(isinstance(each, ToolResult) for each in blocks)


def _without_results(messages: Messages, edit: ClearToolUses) -> tuple[Messages, int]:
    """The conversation with the results of the last calls alone, and how many have gone."""
    excluded = edit.exclude_tools or ()
    calls = [block for block in _blocks(messages) if isinstance(block, ToolUse) and block.name not in excluded]
    old = {call.id: call.name for call in calls[: len(calls) - edit.keep.value]} if edit.keep.value < len(calls) else {}
    done = {
        block.tool_use_id
        for block in _blocks(messages)
        if isinstance(block, ToolResult) and block.tool_use_id in old and block.content != CLEARED
    }
    inputs = edit.clear_tool_inputs
    emptied: Collection[str] = set(old.values()) if inputs is True else inputs or ()

    def cleared(block: Block) -> Block:
        if isinstance(block, ToolResult) and block.tool_use_id in done:
            return structs.replace(block, content=CLEARED)
        if isinstance(block, ToolUse) and block.id in done and block.name in emptied:
            return structs.replace(block, input={})
        return block

    return [
        _replaced(message, [cleared(block) for block in message.content])
        if isinstance(message.content, list)
        else message
        for message in messages
    ], len(done)


def _replaced(message: Message, blocks: list[Block]) -> Message:
    """A turn with other blocks; one that is left without any says nothing."""
    return structs.replace(message, content=blocks or [Text("")])
