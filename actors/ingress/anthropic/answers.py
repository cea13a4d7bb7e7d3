"""Answers as Anthropic's clients know them: content blocks, whole or in events."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_runtime.actors.ingress.openai.turn import Output, Turn
from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from llm_runtime.actors.parsers.json_text import object_of

_encode = msgspec.json.encode


class Answer:
    """The answer to a request.

    Args:
        cut: `max_tokens` was lowered to what fits in the model's context.
        edits: what `context_management` has left out of the conversation; None if it was not asked for.
        show_thinking: False leaves the text of thinking out.
    """

    def __init__(
        self,
        turn: Turn,
        rid: str,
        cut: bool,
        edits: list[dict[str, Any]] | None = None,
        show_thinking: bool = True,
    ) -> None:
        (self._output,) = turn.outputs
        self._turn = turn
        self._cut = cut
        self._managed = {} if edits is None else {"context_management": {"applied_edits": edits}}
        self._show_thinking = show_thinking
        self._message: dict[str, Any] = {
            "id": f"msg_{rid}",
            "type": "message",
            "role": "assistant",
            "model": turn.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._blocks = 0
        self._open: type[Event] | None = None

    def document(self) -> bytes:
        """The whole answer, once all of it has arrived."""
        content = _blocks(self._events(), self._output)
        return _encode({**self._message, "content": content, **self._stop(), "usage": self._usage(), **self._managed})

    def parts(self) -> bytes:
        """The events of a stream for what has arrived since the last call."""
        begins = "content" in self._message
        events = self._events()
        parts: list[bytes] = []
        if begins:
            usage = {**self._usage(), "output_tokens": 0}
            parts += [_event("message_start", message={**self._message, "usage": usage}), _event("ping")]
            del self._message["content"]
        for event in events:
            self._add(parts, event)
        if self._output.entry.finish is not None:
            self._close(parts)
            end = _event("message_delta", delta=self._stop(), usage=self._usage(), **self._managed)
            parts += [end, _event("message_stop")]
        return b"".join(parts)

    def _events(self) -> list[Event]:
        events = self._output.events()
        if self._show_thinking:
            return events
        return [Reasoning("") if isinstance(event, Reasoning) else event for event in events]

    def _add(self, parts: list[bytes], event: Event) -> None:
        match event:
            case Reasoning(text):
                self._begin(parts, Reasoning, {"type": "thinking", "thinking": "", "signature": ""})
                if text:
                    self._delta(parts, {"type": "thinking_delta", "thinking": text})
            case Content(text):
                self._begin(parts, Content, {"type": "text", "text": ""})
                self._delta(parts, {"type": "text_delta", "text": text})
            case CallStart(name=name):
                self._close(parts)
                self._begin(parts, CallStart, _call(self._output.call_id(event), name))
            case CallArguments(text=text):
                self._delta(parts, {"type": "input_json_delta", "partial_json": text})

    def _begin(self, parts: list[bytes], kind: type[Event], block: dict[str, Any]) -> None:
        """Begins a block, unless one of this kind is open."""
        if self._open is kind:
            return
        self._close(parts)
        self._open = kind
        parts.append(_event("content_block_start", index=self._blocks, content_block=block))

    def _delta(self, parts: list[bytes], delta: dict[str, Any]) -> None:
        parts.append(_event("content_block_delta", index=self._blocks, delta=delta))

    def _close(self, parts: list[bytes]) -> None:
        if self._open is not None:
            parts.append(_event("content_block_stop", index=self._blocks))
            self._open = None
            self._blocks += 1

    def _stop(self) -> dict[str, Any]:
        entry = self._output.entry
        reason: str | None
        sequence = None
        if entry.finish == "abort":
            reason = None
        elif entry.finish == "length":
            reason = "model_context_window_exceeded" if self._cut else "max_tokens"
        elif self._output.calls:
            reason = "tool_use"
        elif isinstance(entry.stop_reason, str):
            reason, sequence = "stop_sequence", entry.stop_reason
        else:
            reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        generation = self._turn.generation
        cached = generation.cached_tokens
        return {
            "input_tokens": generation.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generation.completion_tokens,
        }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


def _call(identity: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": {}}


def _blocks(events: list[Event], output: Output) -> list[dict[str, Any]]:
    """The blocks that a stream of the same events adds up to."""
    blocks: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    for event in events:
        kind = blocks[-1]["type"] if blocks else None
        match event:
            case Reasoning(text) if kind == "thinking":
                blocks[-1]["thinking"] += text
            case Reasoning(text):
                blocks.append({"type": "thinking", "thinking": text, "signature": ""})
            case Content(text) if kind == "text":
                blocks[-1]["text"] += text
            case Content(text):
                blocks.append({"type": "text", "text": text})
            case CallStart(name=name):
                blocks.append(_call(output.call_id(event), name))
            case CallArguments(text=text):
                at = len(blocks) - 1
                arguments[at] = arguments.get(at, "") + text
    for at, text in arguments.items():
        blocks[at]["input"] = object_of(text)
    return blocks
