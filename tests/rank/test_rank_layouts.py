"""Checkpoints as others save them: each gives the logits of transformers, or says what is wrong with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rank_tools import generate, rank_config, save_model
from safetensors.torch import load, save_file
from test_rank_weights import write_gguf

from llm_runtime.actors.checkpoint import CheckpointError, GGUFFile, checkpoint_identity, read_config
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor

SAMPLING = SamplingParams(max_tokens=4, seed=0, temperature=0.0, logprobs=0)
PROMPT = list(range(3, 40))
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("saved")
    return path, save_model(path, "LlamaForCausalLM", tie_word_embeddings=True, num_hidden_layers=2)


def in_two(path: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, path / "model-00002-of-00002.safetensors")


def consolidated(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "consolidated.safetensors")


def beside_a_stale_index(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def with_an_index_of_files_that_are_gone(path: Path, tensors: Tensors) -> None:
    beside_a_stale_index(path, tensors)
    (path / "model.safetensors").rename(path / "weights.safetensors")


def with_an_index(path: Path, tensors: Tensors) -> None:
    in_two(path, tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def head_only(path: Path, tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors")


def in_float64(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))


def without_the_head(path: Path, tensors: Tensors) -> None:
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path / "model.safetensors")


def with_leftovers(path: Path, tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "layout",
    [
        in_two,
        consolidated,
        beside_a_stale_index,
        with_an_index_of_files_that_are_gone,
        with_an_index,
        head_only,
        in_float64,
        without_the_head,
        with_leftovers,
    ],
)
def test_the_logits_are_those_of_transformers(
    saved: tuple[Path, Any], tmp_path: Path, layout: Callable[[Path, Tensors], None]
) -> None:
    source, theirs = saved
    shutil.copy(source / "config.json", tmp_path)
    layout(tmp_path, load((source / "model.safetensors").read_bytes()))
    (ours,) = generate(build_executor(rank_config(tmp_path, max_model_len=128, num_pages=16)), [PROMPT], SAMPLING)
    assert_same(ours, theirs)
    assert checkpoint_identity(tmp_path, read_config(tmp_path))


def assert_same(ours: Any, theirs: Any) -> None:
    with torch.inference_mode():
        logits = theirs(torch.tensor([ours.tokens[:-1]])).logits[0, len(PROMPT) - 1 :]
    assert ours.output == logits.argmax(-1).tolist()
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(ours.output)[:, None])[:, 0]
    got = np.concatenate([np.frombuffer(entry.logprobs, np.float32) for entry in ours.logprobs])
    np.testing.assert_allclose(got, wanted, atol=1e-4)


OF_WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
EXPERTS = {"num_experts_per_tok": 8, "n_routed_experts": 32, "moe_intermediate_size": 64, "n_shared_experts": 1}
DEEPSEEK = {
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "first_k_dense_replace": 1},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
}
YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("architecture", "of", "gone", "changes"),
    [
        ("LlamaForCausalLM", {}, (), {"hidden_act": "swish"}),
        ("LlamaForCausalLM", {}, (), {"architectures": ["MyOwnForCausalLM", "LlamaForCausalLM"]}),
        ("LlamaForCausalLM", {}, (), {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1e6}}),
        ("LlamaForCausalLM", {}, (), {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {**YARN, "factor": 2}}),
        ("LlamaForCausalLM", {}, (), {"original_max_position_embeddings": 64, "rope_scaling": YARN}),
        (
            "LlamaForCausalLM",
            {},
            (),
            {
                "original_max_position_embeddings": 64,
                "rope_scaling": {**YARN, "original_max_position_embeddings": 128},
            },
        ),
        (
            "LlamaForCausalLM",
            {},
            (),
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
        ),
        ("Glm4MoeForCausalLM", EXPERTS, ("rms_norm_eps", "num_experts_per_tok", "first_k_dense_replace"), {}),
        (
            "DeepseekV3ForCausalLM",
            {**EXPERTS, **DEEPSEEK},
            ("routed_scaling_factor", "n_group", "topk_group", "num_experts_per_tok", "n_shared_experts"),
            {},
        ),
    ],
    ids=["activation", "names", "thetas", "ropes", "beside", "both", "no-factor", "glm", "deepseek"],
)
def test_keys_count_as_in_transformers(
    tmp_path: Path, architecture: str, of: dict[str, Any], gone: tuple[str, ...], changes: dict[str, Any]
) -> None:
    save_model(tmp_path, architecture, **{**OF_WIDTH, **of})
    file = tmp_path / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in gone}
    file.write_text(json.dumps({**config, **changes, "never_asked_for": [0.0, math.inf]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    (ours,) = generate(build_executor(rank_config(tmp_path, max_model_len=128, num_pages=16)), [PROMPT], SAMPLING)
    assert_same(ours, theirs)


def a_part_is_missing(path: Path, tensors: Tensors) -> None:
    in_two(path, tensors)
    (path / "model-00002-of-00002.safetensors").unlink()


def a_layer_too_few(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def biases_that_no_key_names(path: Path, tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(96)
    save_file(tensors, path / "model.safetensors")


def another_head(path: Path, tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors")


def tokens_that_see_those_behind_them(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "is_causal": False}))


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (another_head, "tie_word_embeddings is true, and the checkpoint has an lm_head.weight .*: set it to false"),
        (tokens_that_see_those_behind_them, "is_causal is false"),
        (a_part_is_missing, "model-00002-of-00002.safetensors is missing"),
        (a_layer_too_few, "no place for, such as model.layers.1.*num_hidden_layers, which is 1"),
        (biases_that_no_key_names, "has 1 tensors .* no place for, such as model.layers.1.self_attn.q_proj.bias"),
    ],
)
def test_what_is_not_the_model_that_was_saved(
    saved: tuple[Path, Any], tmp_path: Path, layout: Callable[[Path, Tensors], None], sentence: str
) -> None:
    shutil.copy(saved[0] / "config.json", tmp_path)
    layout(tmp_path, load((saved[0] / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=sentence):
        build_executor(rank_config(tmp_path, max_model_len=128, num_pages=16))


@pytest.fixture
def split(saved: tuple[Path, Any], tmp_path: Path) -> list[Path]:
    """The model as a GGUF file in three parts, as gguf-split makes them."""
    import gguf

    whole = tmp_path / "whole.gguf"
    write_gguf(whole, saved[1])
    reader = gguf.GGUFReader(whole)
    paths = [tmp_path / f"small-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    item = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::3]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("key", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_factor_without_a_kind_stretches_as_in_llama_cpp(tmp_path: Path, key: str) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = save_model(tmp_path / "theirs", "LlamaForCausalLM", num_hidden_layers=2, rope_parameters=scaling)
    path = tmp_path / "small.gguf"
    write_gguf(path, model, **{key: 2, "llama.attention.sliding_window": 0})
    (ours,) = generate(build_executor(rank_config(path, max_model_len=128, num_pages=16)), [PROMPT], SAMPLING)
    assert_same(ours, model)


def test_a_factor_of_attention_is_refused(saved: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, saved[1], **{"llama.rope.scaling.attn_factor": 2})
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.attn_factor is not supported"):
        read_config(path)


def test_all_parts_of_a_gguf_file_are_read(saved: tuple[Path, Any], split: list[Path]) -> None:
    config = rank_config(split[0], max_model_len=128, num_pages=16)
    (ours,) = generate(build_executor(config), [PROMPT], SAMPLING)
    assert_same(ours, saved[1])


@pytest.mark.parametrize("number", [1, 2])
def test_another_part_than_the_first_is_refused(split: list[Path], number: int) -> None:
    with pytest.raises(CheckpointError, match="is one of 3 files of a model; give the first, NAME-00001-of-00003"):
        GGUFFile(split[number])


def test_parts_that_are_missing_or_others(split: list[Path]) -> None:
    second = split[1].read_bytes()
    split[1].unlink()
    with pytest.raises(CheckpointError, match=r"small-00002-of-00003\.gguf: cannot be read"):
        GGUFFile(split[0])
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(CheckpointError, match="is not part 2 of"):
        GGUFFile(split[0])
    split[1].write_bytes(second)
    renamed = split[0].rename(split[0].with_name("small.gguf"))
    with pytest.raises(CheckpointError, match="give the first"):
        GGUFFile(renamed)
