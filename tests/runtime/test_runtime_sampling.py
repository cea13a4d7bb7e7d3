"""Sampling defaults: from the model's files, and the table above them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from llm_runtime.actors.checkpoint import CheckpointError, ModelConfig, SamplingDefaults, read_sampling_defaults
from llm_runtime.runtime import model_plan
from llm_runtime.runtime.models import EMBEDDED_SAMPLING, ResolvedModel
from llm_runtime.runtime.plan import plan_node
from llm_runtime.runtime.topology import TopologyError, load_topology

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=320,
    max_position=2048,
    rope_theta=1e4,
    rms_eps=1e-5,
    tie_embeddings=True,
)
NONE = SamplingDefaults()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", NONE),
        ("{}", NONE),
        ({"eos_token_id": 2, "temperature": None, "transformers_version": "5"}, NONE),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.95,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.05,
            },
            SamplingDefaults(0.6, 0.95, 20, 0.1, 1.05),
        ),
        ({"temperature": 0.7}, SamplingDefaults(0.7)),
        ({"top_k": 0}, SamplingDefaults(top_k=0)),
        ({"top_k": -1}, SamplingDefaults(top_k=0)),
        ({"top_k": 50.0, "max_new_tokens": 512.0}, SamplingDefaults(top_k=50, max_tokens=512)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, SamplingDefaults(0.0)),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingDefaults(0.0, repetition_penalty=1.1)),
        ({"max_new_tokens": 512, "max_length": 20}, SamplingDefaults(max_tokens=512)),
    ],
)
def test_generation_config(tmp_path: Path, given: Any, expected: SamplingDefaults) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8-sig")
    assert read_sampling_defaults(tmp_path) == expected


def test_no_generation_config(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == NONE


@pytest.mark.parametrize("given", [{"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_nonsense_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=r'defaults = "openai" under \[model.sampling\]'):
        read_sampling_defaults(tmp_path)


def test_gguf_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_float32("general.sampling.top_p", 0.75)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_float32("general.sampling.penalty_repeat", 1.5)
    writer.add_string("general.sampling.sequence", "top_k;top_p")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_sampling_defaults(tmp_path / "m.gguf") == SamplingDefaults(0.5, 0.75, 20, repetition_penalty=1.5)


RECOMMENDED = SamplingDefaults(temperature=0.6, top_k=20)


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("", (), RECOMMENDED),
        ("[model.sampling]\ntemperature = 0\n", (), SamplingDefaults(temperature=0.0, top_k=20)),
        (
            "[model.sampling]\nmax_tokens = 9\n",
            ("model.sampling.top_k=0",),
            SamplingDefaults(0.6, top_k=0, max_tokens=9),
        ),
        ('[model.sampling]\ndefaults = "openai"\n', (), NONE),
        ("", ("model.sampling.defaults=openai", "model.sampling.max_repeats=8"), SamplingDefaults(max_repeats=8)),
    ],
)
def test_the_table_stands_above_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, settings: tuple[str, ...], expected: SamplingDefaults
) -> None:
    monkeypatch.setattr(model_plan, "resolve_model", lambda *_: ResolvedModel("tiny", tmp_path))
    monkeypatch.setattr(model_plan, "read_config", lambda _: MODEL)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    file = tmp_path / "x.toml"
    file.write_text(f'[model]\npath = "m"\ntask = "generate"\n{text}[engine.main]\n')
    (model,) = plan_node(load_topology(file, settings)).models
    assert model.sampling == expected


def test_each_model_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_plan, "resolve_model", lambda *_: ResolvedModel("tiny", tmp_path, EMBEDDED_SAMPLING))
    monkeypatch.setattr(model_plan, "read_config", lambda _: MODEL)
    file = tmp_path / "x.toml"
    file.write_text(
        '[[model]]\npath = "a"\ntask = "generate"\n[model.sampling]\ntop_k = 3\n'
        '[[model]]\npath = "b"\ntask = "generate"\n'
        '[engine.x]\nmodel = "a"\n[engine.y]\nmodel = "b"\n'
    )
    models = plan_node(load_topology(file, ["model.1.sampling.temperature=1"])).models
    assert [(each.sampling.temperature, each.sampling.top_k) for each in models] == [(0.2, 3), (1.0, None)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "[model.sampling]\ntemperature = 3\n",
            "x.toml:4: model.sampling.temperature: is 3; give a number from 0 to 2",
        ),
        (
            "[model.sampling]\ntemprature = 1\n",
            "x.toml:4: model.sampling.temprature: unknown key; did you mean model.sampling.temperature?",
        ),
        ("sampling = 1\n", "x.toml:3: model.sampling: unknown key"),
    ],
)
def test_mistakes_in_the_table(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'[model]\npath = "m"\n{text}[engine.main]\n')
    with pytest.raises(TopologyError) as caught:
        load_topology(file)
    assert caught.value.errors[0].replace(f"{tmp_path}/", "").startswith(error)
