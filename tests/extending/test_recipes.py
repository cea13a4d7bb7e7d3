"""The code of docs/extending.md, installed as packages, serves requests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from extending_node import Node
from extending_packages import install_recipe
from safetensors.torch import load, save_file
from support import eventually

from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.runtime.models import resolve_model

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
COUNTING = "one two three four five six seven eight " * 2 + "one"


def test_a_tool_call_format(node: Node) -> None:
    messages = []
    for city in ("Berlin", "Rome", "Madrid", "Vienna"):
        call = f'@call get_weather {{"city": "{city}"}}'
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "content": call}]
    messages.append({"role": "user", "content": "Weather in Paris?"})
    asked = {"messages": messages, "temperature": 0, "max_tokens": 40}
    (choice,) = node.post("/v1/chat/completions", **asked, tools=[WEATHER])["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (choice,) = node.post("/v1/chat/completions", **asked)["choices"]
    assert choice["message"]["content"] == '@call get_weather {"city": "Paris"}'


def test_a_reasoning_format(node: Node) -> None:
    regex = r"\[think\]Easy\.\n\[/think\]\nFour\."
    messages = [{"role": "user", "content": "Two and two?"}]
    (choice,) = node.post("/v1/chat/completions", messages=messages, regex=regex, max_tokens=40)["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Easy.", "Four.")


def test_a_waiting_policy(node: Node) -> None:
    finished: list[str] = []

    def ask(name: str, words: int, max_tokens: int) -> None:
        node.post("/v1/completions", prompt="word " * words, max_tokens=max_tokens, ignore_eos=True)
        finished.append(name)

    def waiting(count: int) -> None:
        eventually(lambda: node.figure("sglang:num_queue_reqs") == count, f"{count} waiting requests")

    running = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor() as pool:
        with node.open("/v1/completions", running) as first:
            first.readline()
            jobs = [pool.submit(ask, "long", 300, 64)]
            waiting(1)
            jobs.append(pool.submit(ask, "short", 3, 1))
            waiting(2)
        for job in jobs:
            job.result()
    assert finished == ["short", "long"]


def test_a_drafter(node: Node) -> None:
    def guessed_right() -> bool:
        answer = node.post("/v1/completions", prompt=COUNTING, temperature=0, max_tokens=40, ignore_eos=True)
        assert answer["choices"][0]["text"].startswith(" two three")
        return node.figure("runtime:actor_spec_accepted_tokens") > 0

    eventually(guessed_right, "a right guess")


def test_a_model_architecture(model: str, tmp_path: Path) -> None:
    """The same weights, stored in both ways, give the same answers."""
    install_recipe(tmp_path, "Model architecture")
    vocabulary = load_vocabulary(resolve_model(model, tmp_path, False).path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.LlamaConfig(
        vocab_size=vocabulary.tokenizer.get_vocab_size(), num_key_value_heads=2, eos_token_id=2, **sizes
    )
    made = transformers.LlamaForCausalLM(config)
    for name, values in made.named_parameters():
        values.data = torch.randint(16, 64, values.shape) / 32 if "norm" in name else torch.randn(values.shape) * 0.1
    for name, less in (("plain", 0), ("plus-one", 1)):
        path = tmp_path / name
        made.save_pretrained(path)
        (path / "tokenizer.json").write_text(vocabulary.tokenizer.to_str())
        tensors = load((path / "model.safetensors").read_bytes())
        changed = {key: values - less if "norm" in key else values for key, values in tensors.items()}
        save_file(changed, path / "model.safetensors", {"format": "pt"})
    written = (path / "config.json").read_text()
    (path / "config.json").write_text(written.replace("LlamaForCausalLM", "PlusOneLlamaForCausalLM"))
    topology = tmp_path / "node.toml"
    topology.write_text(
        '[[model]]\npath = "plain"\n[[model]]\npath = "plus-one"\n'
        '[engine.plain]\nmodel = "plain"\n[engine.plus]\nmodel = "plus-one"\n'
    )
    node = Node(tmp_path)
    with node.up(topology):
        asked = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        plain, plus_one = (
            node.post("/v1/completions", model=name, **asked)["choices"][0]["text"] for name in ("plain", "plus-one")
        )
    assert plain == plus_one
    assert plain.strip()
