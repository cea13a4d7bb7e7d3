"""Types of weights: which matrix becomes what, and that nothing of a checkpoint's 4 bits is lost on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from rank_tools import generate, rank_config, save_model
from test_rank_group import run_group
from test_rank_weights import write_gguf

from llm_runtime import kernels
from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import GGUFFile, ModelConfig, read_config
from llm_runtime.actors.checkpoint.names import gguf_name
from llm_runtime.actors.dtypes import WeightDType, compute_dtype
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import Executor, RankConfig, build_executor, shard_of, weight_bytes
from llm_runtime.actors.rank import checkpoint_reader as source_module
from llm_runtime.actors.rank import executor as executor_module
from llm_runtime.actors.rank.dequantize import four_bits
from llm_runtime.actors.rank.quantization_policy import auto_dtype, matrix_dtype
from llm_runtime.actors.rank.shard import weight_layout
from llm_runtime.actors.rank.weights import load_weights
from llm_runtime.kernels import reference
from llm_runtime.transport import Arena

GREEDY = SamplingParams(max_tokens=6, seed=0, temperature=0.0, logprobs=0)
PROMPT = list(range(30, 60))
MIXED = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=256,
    num_layers=4,
    num_heads=12,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=512,
    vocab_size=1000,
    max_position=128,
    rope_theta=1e4,
    rms_eps=1e-5,
    tie_embeddings=True,
    weight_type="Q4_K",
    matrix_types={
        "model.embed_tokens": "Q6_K",
        "model.layers.1.self_attn.v_proj": "Q6_K",
        "model.layers.2.mlp.down_proj": "F16",
        "model.layers.3.mlp.down_proj": "Q4_0",
    },
)
"""As llama.cpp's mixtures of types are."""


# -- which type -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype", "activations"),
    [
        ("Q4_0", "int4", "bfloat16"),
        ("Q4_1", "int4", "bfloat16"),
        ("Q4_K", "int4", "bfloat16"),
        ("Q5_0", "int8", "bfloat16"),
        ("Q5_K", "int8", "bfloat16"),
        ("Q6_K", "int8", "bfloat16"),
        ("Q8_0", "int8", "bfloat16"),
        ("F16", "bfloat16", "bfloat16"),
        ("BF16", "bfloat16", "bfloat16"),
        ("F32", "float32", "float32"),
    ],
)
def test_auto_keeps_the_precision(stored: str, dtype: WeightDType, activations: str) -> None:
    assert auto_dtype(msgspec.structs.replace(MIXED, weight_type=stored)) == dtype
    assert compute_dtype(dtype) == activations


def test_auto_goes_by_the_bulk_of_the_values(smollm2: Path, tmp_path: Path) -> None:
    assert auto_dtype(read_config(smollm2)) == "int4"
    save_model(tmp_path, "LlamaForCausalLM")
    assert auto_dtype(read_config(tmp_path)) == "float32"
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    assert auto_dtype(read_config(tmp_path)) == "bfloat16"


def test_each_matrix_has_the_type_it_is_worth() -> None:
    def types(config: ModelConfig, dtype: WeightDType) -> dict[str, str]:
        slots, _ = weight_layout(config, dtype, shard_of(config, 1, 0), False)
        return {slot.name: slot.dtype for slot in slots if len(slot.shape) == 2}

    found = types(MIXED, "int4")
    assert found.pop("embedding") == "int8"
    assert "lm_head" not in found  # rows of the embedding
    assert {name for name, kind in found.items() if kind == "int8"} == {"1.qkv", "2.down"}
    assert {kind for name, kind in found.items() if name not in ("1.qkv", "2.down")} == {"int4"}
    # Of a checkpoint that has no 4 bits, the layers get them.
    floats = msgspec.structs.replace(MIXED, weight_type="BF16", matrix_types={}, tie_embeddings=False)
    found = types(floats, "int4")
    assert found.pop("embedding") == found.pop("lm_head") == "int8"
    assert set(found.values()) == {"int4"}
    for dtype in ("float32", "bfloat16", "int8"):
        assert set(types(MIXED, dtype).values()) == {dtype}


def test_what_does_not_fall_on_groups_is_bfloat16() -> None:
    """12 heads of 16 over 3 key-value heads: on three ranks, 64 columns each; on two, 128 and 64. One head more a
    group, and a rank's columns begin within a group of 32."""

    def of(config: ModelConfig, tp: int, rank: int) -> dict[str, str]:
        slots, _ = weight_layout(config, "int4", shard_of(config, tp, rank), False)
        return {slot.name: slot.dtype for slot in slots}

    assert {of(MIXED, tp, rank)["0.o"] for tp in (2, 3) for rank in range(tp)} == {"int4"}
    odd = msgspec.structs.replace(MIXED, num_heads=15)
    assert [of(odd, 3, rank)["0.o"] for rank in range(3)] == ["bfloat16"] * 3
    assert [of(odd, 2, rank)["0.o"] for rank in range(2)] == ["int4", "bfloat16"]
    assert matrix_dtype(MIXED, "int4", "0.down", 16, 32) == "bfloat16"
    assert matrix_dtype(MIXED, "int8", "0.down", 16, 48) == "int8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_layouts_are_those_of_the_kernels(dtype: WeightDType) -> None:
    for tp, rank, packed in ((1, 0, True), (2, 1, True), (3, 2, False)):
        slots, size = weight_layout(MIXED, dtype, shard_of(MIXED, tp, rank), packed)
        for slot, following in zip(slots, [*slots[1:], None], strict=True):
            if slot.packed:
                assert slot.stored_shape == kernels.packed_shape(slot.dtype, *slot.shape)
                assert slot.nbytes == kernels.packed_bytes(slot.dtype, *slot.shape)
            assert slot.offset + slot.nbytes <= (following.offset if following else size)


def test_no_integers_on_a_gpu() -> None:
    config = RankConfig("/m", "int4", num_pages=1, max_slots=1, max_model_len=1, device="cuda")
    with pytest.raises(StartFailure, match="int4 weights are for the CPU: set dtype to bfloat16"):
        config.check()


# -- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_four_bits_are_kept(kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantization]
    draw = np.random.default_rng(3)
    raw = draw.integers(0, 256, (8, 3, size), dtype=np.uint8)
    raw[..., :4] = draw.normal(0, 0.02, (8, 3, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q4_0":
        raw[..., 2:4] = draw.integers(0, 256, (8, 3, 2))
    wanted = gguf.dequantize(raw.reshape(8, -1), quantization)
    groups = four_bits(kind, torch.from_numpy(raw))
    assert groups is not None
    quants, scales, minimums = groups
    assert (quants.shape, scales.shape, minimums.shape) == (
        (8, 3 * values // 32, 16),
        (8, 3 * values // 32),
        scales.shape,
    )
    got = reference.dequantize(kernels.pack_int4(quants, scales, minimums)).numpy()
    # Q4_K's scales are products, rounded to float16 here.
    np.testing.assert_allclose(got, wanted, rtol=0 if kind != "Q4_K" else 2e-3, atol=0 if kind != "Q4_K" else 1e-3)


def test_int4_of_smollm2_is_the_file(smollm2: Path) -> None:
    config = read_config(smollm2)
    shard = shard_of(config, 1, 0)
    descriptor = Arena.create("weights", weight_bytes(config, "int4", 1, 0))
    weights = load_weights(smollm2, config, "int4", shard, False, descriptor)
    file = GGUFFile(smollm2)

    def stored(module: str) -> torch.Tensor:
        name = gguf_name(f"{module}.weight")
        info = file.tensors[name]
        raw = np.frombuffer(file.data(name), np.uint8).reshape(info.shape[0], -1)
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType[info.type])
        if "q_proj" in module or "k_proj" in module:  # the inverse of convert_hf_to_gguf.py's LlamaModel.permute
            values = values.reshape(-1, config.head_dim // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(values.astype(np.float32))

    for index in (0, 17, 29):
        layer = weights.layers[index]
        for matrix, modules in (
            (layer.attention.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.attention.o, ("self_attn.o_proj",)),
            (layer.mlp.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.mlp.down, ("mlp.down_proj",)),
        ):
            assert isinstance(matrix, kernels.PackedWeight)
            assert matrix.kind == "int4"
            wanted = torch.cat([stored(f"model.layers.{index}.{module}") for module in modules])
            torch.testing.assert_close(reference.dequantize(matrix), wanted, rtol=0, atol=0)
    table = weights.embedding
    assert isinstance(table, kernels.PackedWeight)
    assert isinstance(weights.lm_head, kernels.PackedWeight)
    assert weights.lm_head.panels.data_ptr() == table.panels.data_ptr()
    wanted = stored("model.embed_tokens")
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert ((reference.dequantize(table) - wanted).abs() <= 0.51 * step).all()
    assert weights.nbytes < 0.2 * weight_bytes(config, "float32", 1, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_smollm2_is_near_float32(
    smollm2: Path,
    executor: Executor,
    prompts: list[list[int]],
    expected: list[list[int]],
    dtype: str,
    deterministic: bool,
) -> None:
    """The logprobs of four texts of about 70 tokens: on average, and none of them far off."""
    texts = [prompts[index] + expected[index] for index in (1, 2, 3, 5)]
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)

    def logprobs(executor: Executor) -> Any:
        sequences = generate(executor, texts, sampling)
        return np.concatenate([sequence.prompt_logprobs[1:] for sequence in sequences])

    quantized = build_executor(rank_config(smollm2, dtype=dtype, deterministic=deterministic, num_pages=64))
    difference = logprobs(quantized) - logprobs(executor)
    assert abs(difference.mean()) < 0.05
    assert np.abs(difference).mean() < 0.2


# -- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_restart_maps_the_same_bytes(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads nothing of the checkpoint, which may be gone."""
    path = tmp_path / "model.gguf"
    write_gguf(path, save_model(tmp_path / "hf", "LlamaForCausalLM", intermediate_size=192), "Q4_1")
    descriptor = Arena.create("weights", weight_bytes(read_config(path), dtype, 1, 0))  # type: ignore[arg-type]
    config = rank_config(path, dtype=dtype, max_model_len=128)

    def contents() -> str:
        return hashlib.sha256(Arena(descriptor, private=True).buffer).hexdigest()

    executor = build_executor(config, descriptor)
    (first,) = generate(executor, [PROMPT], GREEDY)
    packed = contents()
    monkeypatch.setattr(source_module, "GGUFSource", None)
    monkeypatch.setattr(executor_module, "read_config", None)
    path.unlink()
    restarted = build_executor(config, descriptor)
    (second,) = generate(restarted, [PROMPT], GREEDY)
    assert contents() == packed
    assert (first.output, first.logprobs) == (second.output, second.logprobs)
    assert restarted.fingerprint == executor.fingerprint


def test_another_type_does_not_map_it(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    descriptor = Arena.create("weights", weight_bytes(read_config(tmp_path), "bfloat16", 1, 0))
    build_executor(rank_config(tmp_path, dtype="int4", max_model_len=128), descriptor)
    with pytest.raises(StartFailure, match="restart the engine"):
        build_executor(rank_config(tmp_path, dtype="int8", max_model_len=128), descriptor)


# -- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "dtype", "kind"), [(2, "int4", "Q4_1"), (3, "int4", "Q4_0"), (2, "int8", "Q8_0"), (3, "bfloat16", "F16")]
)
def test_ranks_together_are_one(tmp_path: Path, tp: int, dtype: str, kind: str) -> None:
    """3 key-value heads of 32, 6 heads, 224 inner columns: uneven on two ranks. Each rank keeps the file's blocks."""
    model = save_model(
        tmp_path / "hf",
        "LlamaForCausalLM",
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=224,
    )
    path = tmp_path / "model.gguf"
    write_gguf(path, model, kind)
    settings: dict[str, Any] = {"dtype": dtype, "max_model_len": 128}
    prompts = [PROMPT, list(range(200, 270)), [5]]
    sampling = {"max_tokens": 1, "seed": 0, "temperature": 0.0, "logprobs": 20}
    runs = [{"prompts": prompts, "sampling": sampling, "how": {}}]
    (together,) = run_group(path, tmp_path, tp, runs, **settings)
    alone = generate(build_executor(rank_config(path, **settings)), prompts, SamplingParams(**sampling))
    for (_, logprobs), sequence in zip(together, alone, strict=True):
        got = np.frombuffer(bytes.fromhex(logprobs[0]), np.float32)
        entry = sequence.logprobs[0]
        wanted = np.frombuffer(entry.logprobs + entry.top_logprobs, np.float32)
        np.testing.assert_allclose(got, wanted, atol=0.3)  # of logprobs from -5 to -3, in bfloat16
