"""Answers as Ollama's clients know them: JSON lines, or one document that they add up to.

Durations are left out: an answer that is made anew must be the same, and they would not be.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from llm_runtime.actors.ingress.openai.logprobs import chat_logprobs
from llm_runtime.actors.ingress.openai.turn import Turn
from llm_runtime.actors.ingress.output_deltas import Identity
from llm_runtime.actors.ingress.times import timestamp
from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Reasoning
from llm_runtime.actors.parsers.json_text import object_of

_encode = msgspec.json.encode


class Answer:
    """The answer to a request.

    Args:
        chat: of /api/chat, whose answers are messages; else of /api/generate.
        model: under the client's name for it.
        gives_context: the end of the answer holds all tokens, for the next request to go on with.
    """

    def __init__(self, turn: Turn, chat: bool, model: str, drawn: Identity, gives_context: bool = False) -> None:
        (self._output,) = turn.outputs
        self._turn = turn
        self._chat = chat
        self._head: dict[str, Any] = {"model": model, "created_at": timestamp(drawn.created)}
        self._call: dict[str, Any] | None = None
        self._arguments = ""
        self._gives_context = gives_context

    def document(self) -> bytes:
        """The whole answer, once all of it has arrived."""
        text, thinking = "", ""
        calls: list[dict[str, Any]] = []
        parts, logprobs = self._news()
        for part in parts:
            text += part.get("content", "")
            thinking += part.get("thinking", "")
            calls += part.get("tool_calls", ())
        whole: dict[str, Any] = {"content": text}
        if thinking:
            whole["thinking"] = thinking
        if calls:
            whole["tool_calls"] = calls
        return _encode({**self._part(whole), **logprobs, **self._end()})

    def lines(self) -> bytes:
        """The lines of a stream for what has arrived since the last call."""
        parts, logprobs = self._news()
        documents = [{**self._part(part), "done": False} for part in parts]
        if logprobs:
            documents[:1] = [{**(documents[0] if documents else {**self._part({}), "done": False}), **logprobs}]
        lines = [_encode(document) for document in documents]
        if self._output.entry.finish is not None:
            lines.append(_encode({**self._part({}), **self._end()}))
        return b"".join(line + b"\n" for line in lines)

    def _news(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Parts of the message, and the logprobs of their tokens where they were asked for. Calls come whole."""
        parts: list[dict[str, Any]] = []
        text, events, logprobs = self._output.take()
        if events is None:
            events = [Content(text)] if text else []
        for event in events:
            if not isinstance(event, CallArguments):
                self._end_call(parts)
            match event:
                case Reasoning(text):
                    parts.append({"thinking": text})
                case Content(text):
                    parts.append({"content": text})
                case CallStart(index, name):
                    self._call = {"id": self._output.call_id(event), "function": {"index": index, "name": name}}
                case CallArguments(text=text):
                    self._arguments += text
        if self._output.entry.finish is not None:
            self._end_call(parts)
        if self._turn.top < 0 or not logprobs:
            return parts, {}
        return parts, {"logprobs": chat_logprobs(logprobs, self._turn.top)["content"]}

    def _end_call(self, parts: list[dict[str, Any]]) -> None:
        if self._call is not None:
            self._call["function"]["arguments"] = object_of(self._arguments)
            parts.append({"tool_calls": [self._call]})
            self._call, self._arguments = None, ""

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if self._chat:
            return {**self._head, "message": {"role": "assistant", "content": "", **part}}
        text = {"response": part.get("content", "")}
        return {**self._head, **text, **({"thinking": part["thinking"]} if "thinking" in part else {})}

    def _end(self) -> dict[str, Any]:
        generation, entry = self._turn.generation, self._output.entry
        context = [*array("i", entry.prompt), *entry.output] if self._gives_context else None
        return {
            "done": True,
            "done_reason": entry.finish,
            **({} if context is None else {"context": context}),
            "prompt_eval_count": generation.prompt_tokens,
            "eval_count": generation.completion_tokens,
        }
