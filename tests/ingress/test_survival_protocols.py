"""`kill -9` of an ingress worker while it streams in the protocols of others: what arrives adds up to the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from . import test_anthropic, test_ollama, test_responses
from .test_survival import OUTPUT, Grow, exchange, grow, kills_at, request

__all__ = ["grow"]

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}


def whole(path: str, **fields: Any) -> bytes:
    """A request without the fields that only some protocols have."""
    head, _, data = request(path, **fields).partition(b"\r\n\r\n")
    body = json.loads(data)
    for name in {"seed", "max_tokens"} - fields.keys():
        del body[name]
    data = json.dumps(body).encode()
    return head.rpartition(b":")[0] + b": %d\r\n\r\n" % len(data) + data


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


PROTOCOLS: dict[str, tuple[bytes, Callable[[str], dict[str, Any]]]] = {
    "anthropic": (
        whole(
            "/v1/messages",
            model="fake",
            messages=MESSAGES,
            max_tokens=400,
            stream=True,
            tools=[*({"name": name, "input_schema": SCHEMA} for name in "fg"), {"type": "web_search_20250305"}],
            thread={"type": "create"},
            context_management={"edits": [{"type": "clear_thinking_20251015"}]},
        ),
        lambda text: test_anthropic.added(test_anthropic.events_of(text)),
    ),
    "ollama": (
        whole("/api/chat", model="fake", messages=MESSAGES, tools=[function(name) for name in "fg"], options={"x": 1}),
        test_ollama.added,
    ),
    "responses": (
        whole("/v1/responses", input="hi", stream=True, tools=[{"type": "function", "name": name} for name in "fg"]),
        lambda text: test_responses.added(test_anthropic.events_of(text)),
    ),
}


def without_identities(value: Any) -> Any:
    """A document without what differs from request to request."""
    if isinstance(value, dict):
        names = {"id", "call_id", "created_at"}
        return {key: without_identities(each) for key, each in value.items() if key not in names}
    return [without_identities(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_goes_on(grow: Grow, protocol: str) -> None:
    tree = grow(tool_call_parser="qwen25", reasoning_parser="qwen3")
    tree.fakes.script = lambda generate: OUTPUT
    sent, added = PROTOCOLS[protocol]
    undisturbed = without_identities(added(exchange(tree, sent).body.decode()))
    assert "I look." in json.dumps(undisturbed)
    tree.fakes.step_s = 0.003
    disturbed = exchange(tree, sent, kills_at(tree, 5, 95, 190))
    assert without_identities(added(disturbed.body.decode())) == undisturbed
    assert tree.figure("connections_resumed") >= 1
