"""Chat templates, against transformers and against what must not happen."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from llm_runtime.actors.tokenizer import chat_template
from llm_runtime.actors.tokenizer.chat_template import ChatTemplate, TemplateFailure

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TRIMMING = """\
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] not in ['user', 'assistant', 'system'] %}
        {{ raise_exception('Only user, assistant and system are known, not "' ~ message['role'] ~ '"!') }}
    {% endif %}
    {%- generation %}[{{ message['role'] }}]{% endgeneration %} {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
"""
TOOLS = """\
{%- set ns = namespace(calls=0, last=dict(a=1)) -%}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- for m in messages -%}
{%- if m.tool_calls is defined -%}
{%- for call in m.tool_calls -%}
{%- set ns.calls = ns.calls + 1 -%}
<call {{ call.function.name }}>{{ call.function.arguments | tojson }}
{%- endfor -%}
{%- elif m.content is string -%}{{ m.content }}
{%- else -%}
{%- for part in m.content -%}{% if part.type != 'text' %}{% continue %}{% endif %}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- if m.reasoning_content is defined %}<think>{{ m.thinking }}</think>{% endif -%}
{%- endfor -%}
{{ ns.calls }} {{ ns.last.a }} {{ enable_thinking | default('unset') }} {{ documents is none }}
"""

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für <b>Köln</b>", "parameters": {"type": "object"}},
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b> ä '\" {{ x }} \u2028"}],
    [
        {"role": "system", "content": " s "},
        {"role": "user", "content": "q\n"},
        {"role": "assistant", "content": "Sure, "},
    ],
    [
        {"role": "user", "content": "w?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "content": "17 °C"},
    ],
    [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "part one "}, {"type": "text", "text": "two "}],
        }
    ],
    [{"role": "user"}],
]
CONTINUE: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    CONTINUE,
    {"tools": [WEATHER]},
    {"arguments": {"enable_thinking": False, "bos_token": "<other>"}},
]


def reference(source: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """What transformers renders; None if it fails."""
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{key: value for key, value in message.items() if value is not None} for message in chat]
    variables: dict[str, Any] = {**SPECIAL, **options.get("arguments", {})}
    try:
        result: Any = render_jinja_template(
            [chat],
            tools=options.get("tools"),
            chat_template=source,
            add_generation_prompt=options.get("add_generation_prompt", True),
            continue_final_message=options.get("continue_final_message", False),
            **variables,
        )
    except Exception:
        return None
    text = result[0][0]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("source", [CHATML, TRIMMING, TOOLS])
def test_equals_transformers(source: str) -> None:
    template = ChatTemplate({"default": source}, SPECIAL)
    rendered = 0
    for chat in CHATS:
        for options in OPTIONS:
            try:
                text = template.render(chat, **options)
            except TemplateFailure:
                text = None
            assert text == reference(source, chat, options), (chat, options)
            rendered += text is not None
    assert rendered >= 8


def test_messages_are_left_as_they_were() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    ChatTemplate({"default": TOOLS}, SPECIAL).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert chat == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


def test_tool_template() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T"}, SPECIAL)
    assert template.render([{"role": "user", "content": ""}]) == "D"
    assert template.render([{"role": "user", "content": ""}], tools=[WEATHER]) == "T"


@pytest.mark.parametrize(
    ("source", "chat", "options", "message"),
    [
        (None, CHATS[0], {}, "no chat template"),
        (TRIMMING, [{"role": "tool", "content": "x"}], {}, '^Only user, assistant and system are known, not "tool"!$'),
        (CHATML, [{"role": "user"}], {}, "has no attribute 'content'"),
        (CHATML, [{"role": "user", "content": 5}], {}, "TypeError"),
        (CHATML, CHATS[1], {"continue_final_message": True}, "exclude each other"),
        (CHATML, [], CONTINUE, "final message"),
        ("x", CHATS[1], CONTINUE, "does not work"),
        ("{{ messages[0].content }}", CHATS[1], CONTINUE, "leaves"),
        (CHATML, CHATS[0], {"arguments": {"messages": []}}, "'messages' is set by the server"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], {}, "unsafe"),
        ("{{ messages.append(1) }}", CHATS[0], {}, "unsafe"),
        ("{% set ns = namespace(_x=1) %}", CHATS[0], {}, "must not begin with _"),
        ("{{ dict.__class__.x }}", CHATS[0], {}, "unsafe"),
        ("{% for i in range(1000000) %}x{% endfor %}", CHATS[0], {}, "Range too big"),
    ],
)
def test_failures_say_why(source: str | None, chat: list[Any], options: dict[str, Any], message: str) -> None:
    template = ChatTemplate({} if source is None else {"default": source}, SPECIAL)
    with pytest.raises(TemplateFailure, match=message):
        template.render(chat, **options)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxx{{ i }}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailure, match="longer than 1000"):
        ChatTemplate({"default": endless}, {}).render([])
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 10**12)
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.01)
    with pytest.raises(TemplateFailure, match="longer than 0 seconds"):
        ChatTemplate({"default": endless}, {}).render([])


def test_broken_template() -> None:
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate({"default": "{% if %}"}, {})


def test_strftime_now() -> None:
    text = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, {}).render([])
    assert text.isdigit()
    assert int(text) > 2000
