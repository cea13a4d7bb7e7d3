"""Choices of a chat answer: what parsers find in an output, as message or as deltas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.openai.logprobs import chat_logprobs
from llm_runtime.actors.ingress.openai.protocol import ChunkFrame
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.turn import Output
from llm_runtime.actors.messages import TextLogprob
from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Event, Reasoning

_encode = msgspec.json.encode


class ChatChoice:
    """One choice of an answer.

    Args:
        top: how many of the most probable tokens are reported; -1 for no logprobs.
    """

    def __init__(self, output: Output, top: int, request: ChatRequest) -> None:
        self._output = output
        self._entry = output.entry
        self._top = top
        self._begun = False
        self._told = 0
        self._ids = bool(request.return_token_ids)
        self._ids_as_tokens = bool(request.return_tokens_as_token_ids)
        self._no_reasoning = request.include_reasoning is False
        self._function = request.functions is not None
        """Calls have the shape that they had before there were tools."""

    def document(self) -> dict[str, Any]:
        """The whole choice, once all of it has arrived."""
        text, events, logprobs = self._take()
        if events is None:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        else:
            message = _message(events, self._output.call_id)
            if self._function and "tool_calls" in message:
                message["function_call"] = message.pop("tool_calls")[0]["function"]
        document = {
            "index": self._entry.index,
            "message": message,
            "logprobs": self._logprobs(logprobs) if self._top >= 0 else None,
            "finish_reason": self._finish_reason,
            "matched_stop": self._entry.stop_reason,
        }
        return {**document, "token_ids": self._entry.output.tolist()} if self._ids else document

    def add_chunks(self, chunks: list[bytes], frame: ChunkFrame, generation: Generation) -> None:
        """Adds the events of a stream for what has arrived since the last call."""
        text, events, logprobs = self._take()
        index = self._entry.index
        if not self._begun:
            self._begun = True
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            prompt = b',"prompt_token_ids":%s' % _encode(self._entry.prompt_ids) if self._ids else b""
            chunks.append(frame.chunk(index, role, generation, prompt))
        ids = self._new_ids()
        if events is None:
            deltas = [b'{"content":%s}' % _encode(text)] if text or logprobs or ids else []
        else:
            deltas = [_encode(self._delta_of(event)) for event in events] or ([b"{}"] if logprobs or ids else [])
        for delta in deltas:
            chunks.append(frame.chunk(index, self._delta(delta, logprobs) + ids, generation))
            logprobs, ids = [], b""
        finish = self._finish_reason
        if finish is not None:
            end = b'"delta":{},"logprobs":null,"finish_reason":"%s","matched_stop":%s' % (
                finish.encode(),
                _encode(self._entry.stop_reason),
            )
            chunks.append(frame.chunk(index, end, generation))

    def _take(self) -> tuple[str, list[Event] | None, list[TextLogprob]]:
        text, events, logprobs = self._output.take()
        if self._no_reasoning and events:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return text, events, logprobs

    def _new_ids(self) -> bytes:
        """The ids of the tokens that have arrived since the last call, as a field; empty if they are not asked for."""
        if not self._ids:
            return b""
        ids = self._entry.output[self._told :].tolist()
        self._told += len(ids)
        return b',"token_ids":%s' % _encode(ids) if ids else b""

    def _logprobs(self, logprobs: list[TextLogprob]) -> dict[str, Any]:
        return chat_logprobs(logprobs, self._top, self._ids_as_tokens)

    @property
    def _finish_reason(self) -> str | None:
        if self._output.calls and self._entry.finish == "stop":
            return "function_call" if self._function else "tool_calls"
        return self._entry.finish

    def _delta(self, delta: bytes, logprobs: list[TextLogprob]) -> bytes:
        if self._top < 0 or not logprobs:
            return b'"delta":%s,"logprobs":null,"finish_reason":null' % delta
        of_tokens = _encode(self._logprobs(logprobs))
        return b'"delta":%s,"logprobs":%s,"finish_reason":null' % (delta, of_tokens)

    def _delta_of(self, event: Event) -> dict[str, Any]:
        match event:
            case Reasoning(text):
                return {"reasoning_content": text}
            case Content(text):
                return {"content": text}
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                if self._function:
                    return {"function_call": function}
                call = {"index": index, "id": self._output.call_id(event), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                if self._function:
                    return {"function_call": {"arguments": text}}
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
