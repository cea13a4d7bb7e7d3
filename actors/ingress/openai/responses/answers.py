"""Responses: items of an output, whole or in events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from llm_runtime.actors.ingress.openai.responses.protocol import ResponsesRequest
from llm_runtime.actors.ingress.openai.turn import Turn
from llm_runtime.actors.ingress.output_deltas import Identity
from llm_runtime.actors.parsers.events import CallArguments, CallStart, Content, Event, Reasoning

_encode = msgspec.json.encode

_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class Answer:
    """The answer to a request.

    An answer that is made anew may be cut into other deltas. So that its events go on with the numbers that the client
    expects, a delta counts as many as it has characters.

    Args:
        stored: the response is kept.
        on_complete: told the whole response, before it is sent.
    """

    def __init__(
        self,
        turn: Turn,
        request: ResponsesRequest,
        drawn: Identity,
        stored: bool = False,
        on_complete: Callable[[dict[str, Any]], None] = lambda response: None,
    ) -> None:
        self._on_complete = on_complete
        (self._output,) = turn.outputs
        self._turn = turn
        self._rid = drawn.rid
        self._items: list[dict[str, Any]] = []
        self._open = False
        self._number = 0
        self._parts: list[bytes] = []
        self._begun = False
        text, reasoning, sampling = request.text, request.reasoning, self._output.entry.sampling
        summary = None if reasoning is None else reasoning.summary or reasoning.generate_summary
        self._fixed: dict[str, Any] = {
            "id": f"resp_{drawn.rid}",
            "object": "response",
            "created_at": drawn.created,
            "model": turn.model,
            "background": False,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id or None,
            "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": summary},
            "store": stored,
            "temperature": sampling.temperature,
            "text": {
                "format": (text and text.format) or {"type": "text"},
                **({"verbosity": text.verbosity} if text and text.verbosity else {}),
            },
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": sampling.top_p,
            "truncation": request.truncation or "disabled",
        }

    def document(self) -> bytes:
        """The whole answer, once all of it has arrived."""
        self.parts()
        return _encode(self._response(self._status))

    def parts(self) -> bytes:
        """The events of a stream for what has arrived since the last call."""
        self._parts = []
        if not self._begun:
            self._begun = True
            for kind in ("response.created", "response.in_progress"):
                self._event(kind, response=self._response("in_progress"))
        for event in self._output.events():
            self._add(event)
        if self._output.entry.finish is not None:
            status = self._status
            self._end_item(status)
            response = self._response(status)
            self._on_complete(response)
            self._event(f"response.{status}", response=response)
        return b"".join(self._parts)

    @property
    def _status(self) -> str:
        return "completed" if self._output.entry.finish == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        generation = self._turn.generation
        details = usage = None
        if status != "in_progress":
            reason = {"length": "max_output_tokens"}.get(self._output.entry.finish or "")
            details = {"reason": reason} if status == "incomplete" else None
            prompt_tokens, completion_tokens = generation.prompt_tokens, generation.completion_tokens
            usage = {
                "input_tokens": prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt_tokens + completion_tokens,
            }
        return {
            **self._fixed,
            "status": status,
            "incomplete_details": details,
            "output": self._items,
            "usage": usage,
        }

    # -- items ----------------------------------------------------------------------------------------------------

    def _add(self, event: Event) -> None:
        match event:
            case Reasoning(text):
                self._begin_item("reasoning", summary=[], content=[])
                self._grow("response.reasoning_text", self._part({"type": "reasoning_text", "text": ""}), text)
            case Content(text):
                self._begin_item("message", role="assistant", content=[])
                empty = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
                self._grow("response.output_text", self._part(empty), text)
            case CallStart(name=name):
                self._end_item("completed")
                self._begin_item("function_call", call_id=self._output.call_id(event), name=name, arguments="")
            case CallArguments(text=text):
                item = self._items[-1]
                item["arguments"] += text
                self._event("response.function_call_arguments.delta", len(text), **self._place(item), delta=text)

    def _begin_item(self, kind: str, **fields: Any) -> None:
        """Begins an item, unless one of this kind is open."""
        if self._open and self._items[-1]["type"] == kind:
            return
        self._end_item("completed")
        identity = f"{_PREFIXES[kind]}_{self._rid}_{len(self._items)}"
        item = {"id": identity, "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._open = True
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _part(self, empty: dict[str, Any]) -> dict[str, Any]:
        """The only part of the open item, which begins as an empty one."""
        item = self._items[-1]
        if not item["content"]:
            item["content"].append(empty)
            self._event("response.content_part.added", **self._place(item, content_index=0), part=empty)
        part: dict[str, Any] = item["content"][0]
        return part

    def _grow(self, kind: str, part: dict[str, Any], text: str) -> None:
        part["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "response.output_text" else {}
        place = self._place(self._items[-1], content_index=0)
        self._event(f"{kind}.delta", len(text), **place, delta=text, **logprobs)

    def _end_item(self, status: str) -> None:
        if not self._open:
            return
        self._open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = item["arguments"]
            self._event(
                "response.function_call_arguments.done", **self._place(item), name=item["name"], arguments=arguments
            )
        else:
            part, place = item["content"][0], self._place(item, content_index=0)
            if item["type"] == "message":
                self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
            else:
                self._event("response.reasoning_text.done", **place, text=part["text"])
            self._event("response.content_part.done", **place, part=part)
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self, item: dict[str, Any], **more: int) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items) - 1, **more}

    def _event(self, kind: str, weight: int = 1, **fields: Any) -> None:
        self._number += weight
        data = _encode({"type": kind, "sequence_number": self._number - 1, **fields})
        self._parts.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), data))
