"""The messages: one class, one mention."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import get_args

import pytest

from llm_runtime.actors import messages
from llm_runtime.actors.messages import AnyMessage, ChatPrompt, Hello, Message
from llm_runtime.transport import Codec, MalformedMessage


def test_the_classes_of_all_modules_are_messages() -> None:
    found = set()
    for module in iter_modules(messages.__path__):
        for _, kind in inspect.getmembers(import_module(f"{messages.__name__}.{module.name}"), inspect.isclass):
            if issubclass(kind, AnyMessage) and kind is not AnyMessage:
                found.add(kind)
    assert len(found) > 50
    assert found == set(get_args(Message))
    assert all(getattr(messages, kind.__name__) is kind for kind in found)


def test_what_is_a_part_of_messages_is_none() -> None:
    codec: Codec[Message] = Codec(Message)
    assert codec.decode(codec.encode("a", 1, 0, Hello())).body == Hello()
    with pytest.raises(MalformedMessage):
        codec.decode(Codec(ChatPrompt).encode("a", 1, 0, ChatPrompt(b"[]")))
