"""The tokenizer as a process: prompts in, token ids out, failures as sentences, and nothing lost when it is killed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus import TEXTS
from text_harness import Node
from vocabularies import byte_level_gguf

from llm_runtime.actors.messages import (
    ActorStats,
    ChatPrompt,
    Detokenize,
    Detokenized,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizeFailed,
)
from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary, pack_ids, unpack_ids

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role + ': ' + m.content }}<|end|>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ suffix | default('') }}"
    "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
)

NewNode = Callable[..., Node]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return byte_level_gguf(path, "llama-bpe", **{"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def vocabulary(model: Path) -> Vocabulary:
    return load_vocabulary(model)


@pytest.fixture
def new_node(tmp_path: Path, model: Path) -> Iterator[NewNode]:
    nodes = []

    def start(**config: Any) -> Node:
        config = {"model": str(model), **config}
        node = Node(tmp_path, "llm_runtime.actors.tokenizer:Tokenizer", "tokenizer", config, ["ingress0", "ingress1"])
        nodes.append(node)
        return node.start()

    yield start
    for node in nodes:
        node.close()


def ids(node: Node, prompt: ChatPrompt | TextPrompt, ingress: str = "ingress0") -> list[int]:
    node.send(ingress, Tokenize("r", prompt))
    return unpack_ids(node.receive(ingress, Tokenized).tokens)


def failure(node: Node, prompt: ChatPrompt | TextPrompt) -> str:
    node.send("ingress0", Tokenize("r", prompt))
    answer = node.receive("ingress0", TokenizeFailed)
    assert answer.rid == "r"
    error: str = answer.error
    return error


def chat(*messages: tuple[str, str], **fields: Any) -> ChatPrompt:
    return ChatPrompt(json.dumps([{"role": role, "content": content} for role, content in messages]), **fields)


def test_prompts(new_node: NewNode, vocabulary: Vocabulary) -> None:
    node = new_node()
    for text in TEXTS:
        assert ids(node, TextPrompt(text)) == vocabulary.encode(text, add_special=True)
        assert ids(node, TextPrompt(text, add_special_tokens=False)) == vocabulary.encode(text, add_special=False)
    assert ids(node, TextPrompt("x"), "ingress1")[0] == vocabulary.bos_id

    rendered = "<|begin|>user: Hi ä<|end|>"
    for prompt, text in [
        (chat(("user", "Hi ä")), rendered + "<|begin|>assistant: "),
        (chat(("user", "Hi ä"), add_generation_prompt=False), rendered),
        (chat(("user", "Hi ä"), ("assistant", "Su"), add_generation_prompt=False, continue_final_message=True),
         rendered + "<|begin|>assistant: Su"),
        (chat(("user", "Hi ä"), tools='[{"type": "function"}]', template_arguments='{"suffix": "!"}'),
         rendered + '[{"type": "function"}]!<|begin|>assistant: '),
    ]:  # fmt: skip
        assert ids(node, prompt) == vocabulary.encode(text, add_special=False)


def test_failures_are_sentences(new_node: NewNode) -> None:
    node = new_node(max_characters=1000)
    assert "1001 characters" in failure(node, TextPrompt("x" * 1001))
    assert "messages is not valid" in failure(node, ChatPrompt("{"))
    assert "messages is not valid" in failure(node, ChatPrompt('["x"]'))
    assert "at least one message" in failure(node, ChatPrompt("[]"))
    assert "tools is not valid" in failure(node, chat(("user", "x"), tools='{"a": 1}'))
    assert "chat_template_kwargs is not valid" in failure(node, chat(("user", "x"), template_arguments="[]"))
    assert "'messages' is set by the server" in failure(node, chat(("user", "x"), template_arguments='{"messages": 1}'))
    assert "has no attribute 'role'" in failure(node, ChatPrompt('[{"content": "x"}]'))
    deep = "[" * 100_000 + "]" * 100_000
    assert "messages is not valid" in failure(node, ChatPrompt(deep))
    assert ids(node, TextPrompt("still here"))
    figures = node.receive("ingress0", ActorStats).figures
    assert figures["tokenizer_failures"] == 9.0
    assert node.stop() == 0


def test_detokenize(new_node: NewNode, vocabulary: Vocabulary) -> None:
    node = new_node()
    text = "Ünï 🚀<|end|> done"
    tokens = vocabulary.encode(text, add_special=False)
    node.send("ingress0", Detokenize("r", pack_ids(tokens)))
    answer = node.receive("ingress0", Detokenized)
    assert answer.text == text
    assert answer.pieces == [vocabulary.token_bytes[token].decode("utf-8", "replace") for token in tokens]
    node.send("ingress0", Detokenize("r", pack_ids(tokens), skip_special_tokens=True))
    assert node.receive("ingress0", Detokenized).text == "Ünï 🚀 done"
    for packed, message in [
        (pack_ids([vocabulary.size]), f"{vocabulary.size} is not one of"),
        (pack_ids([3, -1]), "-1 is not one of"),
        (b"abc", "not packed"),
    ]:
        node.send("ingress0", Detokenize("r", packed))
        assert message in node.receive("ingress0", TokenizeFailed).error


def test_killed_with_a_prompt_in_hand(new_node: NewNode, vocabulary: Vocabulary) -> None:
    node = new_node()
    for _ in range(3):
        node.kill()
        node.send("ingress0", Tokenize("r", TextPrompt("again")))  # waits in the ingress' queue
        node.start()
        assert unpack_ids(node.receive("ingress0", Tokenized).tokens) == vocabulary.encode("again", add_special=True)


def test_chat_template_of_the_topology(new_node: NewNode, vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("{{ messages[0].content }}{{ bos_token }}")
    node = new_node(chat_template=str(file))
    assert ids(node, chat(("user", "x"))) == vocabulary.encode("x<|begin|>", add_special=False)


def test_text_that_the_library_refuses(new_node: NewNode, tmp_path: Path) -> None:
    file = tmp_path / "surrogate.jinja"
    file.write_text(r"{{ '\ud800' }}")
    node = new_node(chat_template=str(file))
    assert "cannot be encoded" in failure(node, chat(("user", "x")))
    assert ids(node, TextPrompt("still here"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "/nowhere"}, "no such file or directory"),
        ({"chat_template": "/nowhere"}, "/nowhere cannot be read"),
        ({"chat_template": __file__ + "/../bad.jinja"}, "cannot be read"),
        ({"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_cannot_start(new_node: NewNode, config: dict[str, Any], message: str) -> None:
    node = new_node(**config)
    assert node.report.startswith("failed")
    assert re.search(message, node.report)
    assert node.process is not None
    assert node.process.wait(10) == 1


def test_model_without_chat_template(new_node: NewNode, tmp_path: Path) -> None:
    node = new_node(model=str(byte_level_gguf(tmp_path / "plain.gguf", "gpt-2")))
    assert "no chat template" in failure(node, chat(("user", "x")))
    assert ids(node, TextPrompt("x"))
