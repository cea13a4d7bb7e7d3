"""Choices of a chat answer: what parsers find in an output, as message or as deltas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from actors.ingress.generation import Generation
from actors.ingress.openai.logprobs import chat_logprobs
from actors.ingress.openai.protocol import ChunkFrame
from actors.ingress.openai.turn import Output
from actors.messages import TextLogprob
from actors.parsers.events import CallArguments, CallStart, Content, Event, Reasoning

_encode = msgspec.json.encode


class ChatChoice:
    """One choice of an answer.

    Args:
        top: how many of the most probable tokens are reported; -1 for no logprobs.
    """

    def __init__(self, output: Output, top: int) -> None:
        self._output = output
        self._entry = output.entry
        self._top = top
        self._begun = False

    def document(self) -> dict[str, Any]:
        """The whole choice, once all of it has arrived."""
        text, events, logprobs = self._output.take()
        if events is None:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        else:
            message = _message(events, self._output.call_id)
        return {
            "index": self._entry.index,
            "message": message,
            "logprobs": chat_logprobs(logprobs, self._top) if self._top >= 0 else None,
            "finish_reason": self._finish_reason,
            "matched_stop": self._entry.stop_reason,
        }

    def add_chunks(self, chunks: list[bytes], frame: ChunkFrame, generation: Generation) -> None:
        """Adds the events of a stream for what has arrived since the last call."""
        text, events, logprobs = self._output.take()
        index = self._entry.index
        if not self._begun:
            self._begun = True
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            chunks.append(frame.chunk(index, role, generation))
        if events is None:
            if text or logprobs:
                chunks.append(frame.chunk(index, self._delta(b'{"content":%s}' % _encode(text), logprobs), generation))
        else:
            deltas = [_encode(self._delta_of(event)) for event in events] or ([b"{}"] if logprobs else [])
            for delta in deltas:
                chunks.append(frame.chunk(index, self._delta(delta, logprobs), generation))
                logprobs = []
        finish = self._finish_reason
        if finish is not None:
            end = b'"delta":{},"logprobs":null,"finish_reason":"%s","matched_stop":%s' % (
                finish.encode(),
                _encode(self._entry.stop_reason),
            )
            chunks.append(frame.chunk(index, end, generation))

    @property
    def _finish_reason(self) -> str | None:
        return "tool_calls" if self._output.calls and self._entry.finish == "stop" else self._entry.finish

    def _delta(self, delta: bytes, logprobs: list[TextLogprob]) -> bytes:
        if self._top < 0 or not logprobs:
            return b'"delta":%s,"logprobs":null,"finish_reason":null' % delta
        of_tokens = _encode(chat_logprobs(logprobs, self._top))
        return b'"delta":%s,"logprobs":%s,"finish_reason":null' % (delta, of_tokens)

    def _delta_of(self, event: Event) -> dict[str, Any]:
        match event:
            case Reasoning(text):
                return {"reasoning_content": text}
            case Content(text):
                return {"content": text}
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": self._output.call_id(event), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(events: list[Event], call_id: Callable[[CallStart], str]) -> dict[str, Any]:
    """The message that a stream of the same events adds up to."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append({"id": call_id(event), "type": "function", "function": {"name": event.name, "arguments": ""}})
        elif isinstance(event, CallArguments):
            calls[event.index]["function"]["arguments"] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not content and (calls or reasoning):
        message["content"] = None
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message
