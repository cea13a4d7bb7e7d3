"""Names of requests, what answers tell of the prefix cache, and who may take profiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Served, one_ingress

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def discreet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that does not tell what was cached, and asks for a key."""
    with one_ingress(tmp_path_factory.mktemp("i"), cache_report=False, api_key="secret") as served:
        served.client.headers.update(KEY)
        yield served


def usages(served: Served) -> dict[str, dict[str, Any]]:
    """`usage` of an answer of each protocol, streamed and not."""
    post, found = served.client.post, {}
    for name, path, body in (
        ("chat", "/v1/chat/completions", CHAT),
        ("completions", "/v1/completions", {"prompt": "hi", "max_tokens": 3}),
        ("responses", "/v1/responses", {"input": "hi", "max_output_tokens": 3}),
        ("messages", "/v1/messages", {**CHAT, "model": "fake"}),
    ):
        found[name] = post(path, json=body).json()["usage"]
        more = {"stream_options": {"include_usage": True}} if name in ("chat", "completions") else {}
        text = post(path, json={**body, "stream": True, **more}).text
        documents = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        of = [each.get("response", each.get("message", each)).get("usage") for each in documents]
        deltas = [each.get("usage") for each in documents if each.get("type") == "message_delta"]
        found[f"{name}, streamed"] = [usage for usage in deltas or of if usage][-1]
    return found


def test_answers_tell_what_was_cached(shared: Served) -> None:
    for name, usage in usages(shared).items():
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        assert details.get("cached_tokens", usage.get("cache_read_input_tokens")) == 1, name


def test_answers_do_not_tell_what_was_cached(discreet: Served, shared: Served) -> None:
    told = usages(shared)
    for name, usage in usages(discreet).items():
        assert "prompt_tokens_details" not in usage, name
        assert usage.get("input_tokens_details", {}).get("cached_tokens", 0) == 0, name
        assert usage.get("cache_read_input_tokens", 0) == 0, name
        if "messages" in name:  # what was cached is among the other tokens
            assert usage["input_tokens"] == told[name]["input_tokens"] + 1


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)])
def test_the_name_of_a_request_comes_back(shared: Served, given: str, kept: bool) -> None:
    answers = [
        shared.client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": given}),
        shared.client.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers={"X-Request-Id": given}),
        shared.client.post("/v1/chat/completions", json={"messages": 1}, headers={"X-Request-Id": given}),
        shared.client.get("/v1/models", headers={"X-Request-Id": given}),
    ]
    for answer in answers:
        name = answer.headers["x-request-id"]
        assert (name == given) if kept else re.fullmatch("[0-9a-f]{24}", name)


def test_profiles_are_for_those_with_the_key(discreet: Served, tmp_path: Path) -> None:
    for path in ("/start_profile", "/stop_profile"):
        assert discreet.client.post(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert discreet.client.get(path).status_code == 405
        # A page in a browser can send a request without a body, but not without its origin.
        assert discreet.client.post(path, headers={"Origin": "http://elsewhere"}).status_code == 415
        assert discreet.client.post(path, json={"x": 1}).status_code == 400
