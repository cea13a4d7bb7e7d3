"""System messages in the middle of a conversation, in templates of every kind."""

from __future__ import annotations

from typing import Any

import pytest

from llm_runtime.actors.tokenizer.chat_template import ChatTemplate

IN_PLACE = """\
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# As Qwen3.5's.
REFUSING = """\
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('must be first') }}{% endif %}
{{- '<|' + m.role + '|>' + m.content }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# As Gemma's and Mistral's.
ALTERNATING = """\
{%- if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{{- '<' + m.role + '>' + (first + ' ' if loop.first else '') + m.content }}{% endfor %}
{%- if add_generation_prompt %}<model>{% endif %}"""
DROPPING = """\
{%- for m in messages %}{% if m.role != 'system' or loop.first %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# As DeepSeek-V3's.
MOVING = """\
{%- for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "system", "content": "X"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def rendered(source: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    return ChatTemplate({"default": source}, {}).render(messages, **fields)


def test_a_template_that_takes_them_anywhere_is_left_alone() -> None:
    text = rendered(IN_PLACE, CHAT)
    assert (
        text == "<|system|>S<|end|><|user|>a<|end|><|system|>X<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    )


@pytest.mark.parametrize("source", [REFUSING, ALTERNATING, DROPPING, MOVING])
def test_elsewhere_they_become_a_part_of_the_message_before(source: str) -> None:
    folded = [CHAT[0], {"role": "user", "content": "a\n\nX"}, *CHAT[3:]]
    assert rendered(source, CHAT) == rendered(source, folded)
    # What is added changes nothing of what was there.
    assert rendered(source, CHAT).startswith(rendered(source, CHAT[:3], add_generation_prompt=False))


def test_what_is_behind_an_answer_opens_the_next_message() -> None:
    instruction = {"role": "system", "content": "X"}
    after_answer = [*CHAT[:2], *CHAT[3:4], instruction, CHAT[4]]
    assert "X\n\nc" in rendered(REFUSING, after_answer)
    assert rendered(REFUSING, after_answer[:-1]).endswith("<|user|>X<|assistant|>")
    tool = {"role": "tool", "content": "t"}
    assert "t\n\nX" in rendered(DROPPING, [*CHAT[:2], tool, instruction])


def test_texts_in_parts() -> None:
    parts = [{"type": "text", "text": "c"}]
    source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert rendered(source, [{"role": "user", "content": parts}, CHAT[2]]) == "[c][X]"
