"""What agents and tool runners send to /v1/messages beyond plain conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Served, one_ingress
from .test_anthropic import REASONED, SEARCH, TOOLS, URL, added, body, events_of, prompt_of

USER = {"role": "user", "content": "a"}
CALL = {"type": "tool_use", "id": "c1", "name": "now", "input": {"zone": "CET"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "noon"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with one_ingress(tmp_path_factory.mktemp("i"), tool_call_parser="qwen25", reasoning_parser="qwen3") as served:
        served.fakes.per_step = 3
        served.fakes.script = lambda generate: "Hello."
        yield served


def answered(served: Served, url: str = URL, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    """The answer, and what it warns of."""
    response = served.client.post(url, json=body(max_tokens=20, **fields))
    assert response.status_code == 200, response.text
    return response.json(), response.headers.get_list("warning")


def roles(served: Served, *messages: dict[str, Any], **fields: Any) -> list[tuple[str, str]]:
    """The conversation that the template is given."""
    answered(served, messages=list(messages), **fields)
    return [(each["role"], each["content"]) for each in prompt_of(served)[0]]


def shown(served: Served, **fields: Any) -> list[str]:
    """The names of the tools that the template is given."""
    answered(served, **fields)
    tools = prompt_of(served)[1].tools
    return [each["function"]["name"] for each in json.loads(tools)] if tools else []


def test_system_messages_between_turns(shared: Served) -> None:
    late = {"role": "system", "content": "Be concise."}
    assert roles(shared, USER, late, USER) == [("user", "a"), ("system", "Be concise."), ("user", "a")]
    assert roles(shared, late, USER, system="Be kind.") == [("system", "Be kind. Be concise."), ("user", "a")]
    calling = {"role": "assistant", "content": [CALL]}
    between = roles(shared, USER, calling, late, {"role": "user", "content": [RESULT]}, tools=TOOLS)
    assert [role for role, _ in between] == ["user", "assistant", "tool", "system"]
    once = {**late, "clear_at": "next_user_message"}
    assert roles(shared, USER, once) == [("user", "a"), ("system", "Be concise.")]
    assert roles(shared, USER, once, USER) == [("user", "a a")]


def test_a_system_message_about_the_effort(shared: Served) -> None:
    effort = {"role": "system", "content": [], "output_config": {"effort": "max"}}
    assert roles(shared, USER, effort, output_config={"effort": "low"}) == [("user", "a")]
    assert json.loads(prompt_of(shared)[1].template_arguments) == {"reasoning_effort": "max"}
    wrong = shared.client.post(URL, json=body(messages=[{**USER, "clear_at": "never"}]))
    assert (wrong.status_code, "messages[0].clear_at" in wrong.text) == (400, True)


def test_the_line_that_differs_in_each_request_is_left_out(shared: Served) -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=3f1;"}
    assert roles(shared, USER, system=[billing, {"type": "text", "text": "Be kind."}])[0] == ("system", "Be kind.")
    assert roles(shared, USER, system=[billing]) == [("user", "a")]


def test_blocks_of_servers_are_skipped(shared: Served) -> None:
    content = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "text", "text": "b", "citations": [{"type": "page_location"}]},
        {"type": "fallback", "from": {}, "to": {}},
    ]
    messages = [USER, {"role": "assistant", "content": content}, USER]
    _, warnings = answered(shared, messages=messages)
    assert [(each["role"], each["content"]) for each in prompt_of(shared)[0]] == [
        *(("user", "a"), ("assistant", "b"), ("user", "a"))
    ]
    assert len(warnings) == 3
    assert "messages[1].content[1]: a block of type 'server_tool_use' is skipped" in warnings[0]
    summary = {"type": "compaction", "content": "They said a.", "encrypted_content": "x"}
    assert roles(shared, {"role": "assistant", "content": [summary]}, USER)[0] == ("assistant", "They said a.")


def test_documents_of_text(shared: Served) -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    search = {"type": "search_result", "source": "http://x", "title": "S", "content": [{"type": "text", "text": "R"}]}
    cited = {**document, "citations": {"enabled": True}}
    _, warnings = answered(shared, messages=[{"role": "user", "content": [cited, search]}])
    assert prompt_of(shared)[0] == [{"role": "user", "content": "T\nD S\nhttp://x\nR"}]
    assert "citations is skipped" in warnings[0]
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
    refused = shared.client.post(URL, json=body(messages=[{"role": "user", "content": [pdf]}]))
    assert (refused.status_code, "'base64'" in refused.text) == (400, True)


def test_tools_of_servers_are_skipped(shared: Served) -> None:
    toolset = {"type": "mcp_toolset", "mcp_server_name": "m"}
    document, warnings = answered(shared, tools=[SEARCH, toolset, *TOOLS], mcp_servers=[{"name": "m"}], speed="fast")
    assert document["content"] == [{"type": "text", "text": "Hello."}]
    assert any("tools[0]: a tool of type 'web_search_20250305' is skipped" in each for each in warnings)
    assert len(warnings) == 4
    assert shown(shared, tools=[SEARCH, *TOOLS]) == ["get_weather", "now"]
    assert shown(shared, tools=[SEARCH], tool_choice={"type": "auto"}) == []
    only_code = {**TOOLS[1], "allowed_callers": ["code_execution_20250825"]}
    assert shown(shared, tools=[TOOLS[0], only_code]) == ["get_weather"]


def test_tools_that_anthropic_has_defined(shared: Served) -> None:
    types = ["bash_20250124", "text_editor_20250728", "memory_20250818"]
    names = ["bash", "str_replace_based_edit_tool", "memory"]
    tools = [{"type": kind, "name": name} for kind, name in zip(types, names, strict=True)]
    assert shown(shared, tools=tools) == names
    for tool in json.loads(prompt_of(shared)[1].tools):
        assert "command" in tool["function"]["parameters"]["properties"]


def test_deferred_tools(shared: Served) -> None:
    deferred = {**TOOLS[0], "defer_loading": True}
    assert shown(shared, tools=[deferred, TOOLS[1]]) == ["now"]
    assert shown(shared, tools=[deferred, TOOLS[1]], tool_choice={"type": "tool", "name": "get_weather"}) == [
        "get_weather"
    ]
    found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "get_weather"}]}
    messages = [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [found]}]
    assert shown(shared, tools=[deferred, TOOLS[1]], messages=messages) == ["get_weather", "now"]
    assert prompt_of(shared)[0][-1]["content"] == "The tool get_weather can be called now."
    searching = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    assert shown(shared, tools=[searching, deferred]) == ["get_weather"]


def test_tools_that_come_and_go(shared: Served) -> None:
    def changed(*blocks: dict[str, Any]) -> list[str]:
        return shown(shared, tools=TOOLS, messages=[USER, {"role": "system", "content": list(blocks)}])

    reference = {"type": "tool_reference", "name": "now"}
    definition = {"type": "tool_definition", "definition": {"name": "new", "input_schema": {"type": "object"}}}
    assert changed({"type": "tool_removal", "tool": reference}) == ["get_weather"]
    assert changed({"type": "tool_removal", "tool": reference}, {"type": "tool_addition", "tool": reference}) == [
        *("get_weather", "now")
    ]
    assert changed({"type": "tool_addition", "tool": definition}) == ["get_weather", "now", "new"]


def test_examples_are_shown(shared: Served) -> None:
    answered(shared, tools=[{**TOOLS[0], "input_examples": [{"city": "Bern"}], "eager_input_streaming": True}])
    (tool,) = json.loads(prompt_of(shared)[1].tools)
    assert tool["function"]["description"] == 'The weather of a place.\n\nExamples of the input:\n{"city":"Bern"}'


def test_threads(shared: Served) -> None:
    answered(shared, thread={"type": "create"})
    lost = shared.client.post(URL, json=body(thread={"type": "continue", "previous_message_id": "msg_1"}))
    assert lost.status_code == 404
    assert lost.json()["error"]["details"] == {"error_code": "thread_not_found"}
    assert lost.json()["error"]["type"] == "not_found_error"


def turns(count: int) -> list[dict[str, Any]]:
    """Turns of thinking, a call, its result, and an answer."""
    messages: list[dict[str, Any]] = []
    for i in range(count):
        thinking = {"type": "thinking", "thinking": f"t{i}", "signature": ""}
        messages += [
            {"role": "user", "content": f"u{i}"},
            {"role": "assistant", "content": [thinking, {**CALL, "id": f"c{i}"}]},
            {"role": "user", "content": [{**RESULT, "tool_use_id": f"c{i}", "content": f"r{i}" * 20}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"a{i}"}]},
        ]
    return [*messages, {"role": "user", "content": "end"}]


def managed(served: Served, *edits: dict[str, Any], count: int = 3) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation that is left, and the edits that were applied."""
    fields: Any = {"messages": turns(count), "tools": TOOLS, "context_management": {"edits": list(edits)}}
    document, _ = answered(served, **fields)
    applied = document["context_management"]["applied_edits"]
    left = prompt_of(served)[0]
    served.fakes.script = lambda generate: "Hello."
    streamed = served.client.post(URL, json=body(max_tokens=20, stream=True, **fields))
    assert events_of(streamed.text)[-2]["context_management"]["applied_edits"] == applied
    return left, applied


def test_clearing_of_thinking(shared: Served) -> None:
    kind = "clear_thinking_20251015"
    whole, applied = managed(shared, {"type": kind, "keep": "all"})
    assert applied == []
    assert [each["reasoning_content"] for each in whole if "reasoning_content" in each] == ["t0", "t1", "t2"]
    left, (edit,) = managed(shared, {"type": kind, "keep": {"type": "thinking_turns", "value": 2}})
    assert [each["reasoning_content"] for each in left if "reasoning_content" in each] == ["t1", "t2"]
    assert (edit["type"], edit["cleared_thinking_turns"]) == (kind, 1)
    assert managed(shared, {"type": kind})[1][0]["cleared_thinking_turns"] == 2


def test_clearing_of_results(shared: Served) -> None:
    kind = "clear_tool_uses_20250919"
    assert managed(shared, {"type": kind})[1] == []
    assert managed(shared, {"type": kind, "trigger": {"type": "tool_uses", "value": 3}}, count=3)[1] == []
    edit = {"type": kind, "trigger": {"type": "input_tokens", "value": 50}, "keep": {"type": "tool_uses", "value": 1}}
    left, (applied,) = managed(shared, edit)
    results = [each["content"] for each in left if each["role"] == "tool"]
    assert results == ["[This result was removed to save context.]"] * 2 + ["r2" * 20]
    assert applied["cleared_tool_uses"] == 2
    assert [each["tool_calls"][0]["function"]["arguments"] for each in left if "tool_calls" in each] == [
        {"zone": "CET"}
    ] * 3
    emptied, _ = managed(shared, {**edit, "clear_tool_inputs": True})
    assert [each["tool_calls"][0]["function"]["arguments"] for each in emptied if "tool_calls" in each] == [
        *({}, {}, {"zone": "CET"})
    ]
    assert managed(shared, {**edit, "exclude_tools": ["now"]})[1] == []
    assert managed(shared, {**edit, "clear_at_least": {"type": "input_tokens", "value": 10_000}})[1] == []


def test_counting_is_of_what_is_left(shared: Served) -> None:
    edit = {"type": "clear_tool_uses_20250919", "trigger": {"type": "tool_uses", "value": 1}}
    fields: Any = {"messages": turns(4), "tools": TOOLS, "context_management": {"edits": [edit]}}
    counted = shared.client.post(f"{URL}/count_tokens", json={"model": "fake", **fields}).json()
    plain = shared.client.post(f"{URL}/count_tokens", json={"model": "fake", **fields, "context_management": None})
    document, _ = answered(shared, **fields)
    usage = document["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted["context_management"]["original_input_tokens"] == plain.json()["input_tokens"]
    assert counted["input_tokens"] != plain.json()["input_tokens"]


def test_compaction_is_skipped(shared: Served) -> None:
    document, (warning,) = answered(shared, context_management={"edits": [{"type": "compact_20260112"}]})
    assert "compact_20260112 is skipped" in warning
    assert document["context_management"] == {"applied_edits": []}


def test_thinking_that_is_not_to_be_shown(shared: Served) -> None:
    shared.fakes.script = lambda generate: REASONED
    thinking = {"type": "enabled", "budget_tokens": 5000, "display": "omitted"}
    whole = shared.client.post(URL, json=body(thinking=thinking)).json()
    streamed = added(events_of(shared.client.post(URL, json=body(thinking=thinking, stream=True)).text))
    shared.fakes.script = lambda generate: "Hello."
    for each in (whole, streamed):
        assert each["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
        assert each["content"][1]["text"]


def test_what_asks_for_nothing_here(shared: Served) -> None:
    fields = {
        "fallbacks": "default",
        "mcp_servers": [],
        "container": None,
        "metadata": {"user_id": "u"},
        "cache_control": {"type": "ephemeral"},
        "service_tier": "auto",
        "context_management": None,
    }
    headers = {"anthropic-beta": "unheard-2099-01-01", "anthropic-version": "2023-06-01"}
    response = shared.client.post(URL, json=body(max_tokens=20, **fields), headers=headers)
    assert response.status_code == 200
    assert "warning" not in response.headers
    text = {"type": "text", "text": "b", "citations": None, "unheard": None}
    returned = {"role": "assistant", "content": [text], "thinking_blocks": None, "id": None}
    silent = {"role": "assistant", "content": None}
    result = {"type": "tool_result", "tool_use_id": "c", "content": None, "is_error": None}
    assert roles(shared, USER, returned, silent, {"role": "user", "content": [result]}) == [
        *(("user", "a"), ("assistant", "b"), ("tool", ""))
    ]
    assert shared.client.post(URL, json=body(max_tokens=2.0, top_k=5.0)).status_code == 200


def test_the_identity_of_a_request(shared: Served) -> None:
    for stream in (False, True):
        headers = shared.client.post(URL, json=body(max_tokens=2, stream=stream)).headers
        assert headers["request-id"] == headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", ""), ("GET", ""), ("GET", "/b1"), ("GET", "/b1/results"), ("POST", "/b1/cancel")]
)
def test_batches_are_refused(shared: Served, method: str, path: str) -> None:
    response = shared.client.request(method, f"{URL}/batches{path}", json={"requests": []})
    assert response.status_code == 404
    document = response.json()
    assert (document["type"], document["error"]["type"]) == ("error", "not_found_error")
    assert "/v1/messages" in document["error"]["message"]
