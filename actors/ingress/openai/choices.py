"""Choices of a chat answer: what parsers find in an output, as message or as deltas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from actors.ingress.generation import Generation
from actors.ingress.ledger import Entry
from actors.ingress.openai.logprobs import chat_logprobs
from actors.ingress.openai.protocol import ChunkFrame
from actors.ingress.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from actors.ingress.parsers.output import OutputParser
from actors.messages import TextLogprob

_encode = msgspec.json.encode

NameCall = Callable[[int, int], str]
"""The identity of a call, from the indices of its choice and of the call."""


class ChatChoice:
    """One choice of an answer.

    Args:
        parser: None if the output is the content.
        top: how many of the most probable tokens are reported; -1 for no logprobs.
        name_call: for calls to which the model itself gives no identity.
    """

    def __init__(self, entry: Entry, parser: OutputParser | None, top: int, name_call: NameCall) -> None:
        self._entry = entry
        self._parser = parser
        self._top = top
        self._name_call = name_call
        self._begun = False
        self._calls = False

    def document(self) -> dict[str, Any]:
        """The whole choice, once all of it has arrived."""
        text, events, logprobs = self._take()
        if events is None:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        else:
            message = _message(events, self._call_id)
        return {
            "index": self._entry.index,
            "message": message,
            "logprobs": chat_logprobs(logprobs, self._top) if self._top >= 0 else None,
            "finish_reason": self._finish_reason,
            "matched_stop": self._entry.stop_reason,
        }

    def add_chunks(self, chunks: list[bytes], frame: ChunkFrame, generation: Generation) -> None:
        """Adds the events of a stream for what has arrived since the last call."""
        text, events, logprobs = self._take()
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

    def _take(self) -> tuple[str, list[Event] | None, list[TextLogprob]]:
        """Text and logprobs that are new, and what the parser makes of the text; None if there is no parser."""
        text, _, logprobs = self._entry.take()
        if self._parser is None:
            return text, None, logprobs
        events = self._parser.feed(text)
        if self._entry.finish is not None:
            events += self._parser.finish()
        self._calls = self._calls or any(isinstance(event, CallStart) for event in events)
        return text, events, logprobs

    @property
    def _finish_reason(self) -> str | None:
        return "tool_calls" if self._calls and self._entry.finish == "stop" else self._entry.finish

    def _call_id(self, call: CallStart) -> str:
        return call.id or self._name_call(self._entry.index, call.index)

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
                call = {"index": index, "id": self._call_id(event), "type": "function", "function": function}
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
