"""Checkpoints from outside: GGUF and config.json, whole, damaged, and of models that are not supported."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from rank_tools import save_model
from test_rank_weights import write_gguf

from llm_runtime.actors.checkpoint import CheckpointError, GGUFFile, Latent, read_config


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "small.gguf", save_model(directory / "hf", "LlamaForCausalLM", num_hidden_layers=1))
    return directory / "small.gguf"


def test_against_the_reader_of_gguf_py(smollm2: Path) -> None:
    ours, theirs = GGUFFile(smollm2), gguf.GGUFReader(smollm2)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    for key, value in ours.metadata.items():
        if not isinstance(value, list) or len(value) < 100:
            assert value == theirs.fields[key].contents()
    tokens = ours.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    for index in (0, 1, 17, 255, 49151):
        assert tokens[index] == theirs.fields["tokenizer.ggml.tokens"].contents(index)
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(int(size) for size in tensor.shape[::-1])


def test_config_of_smollm2(smollm2: Path) -> None:
    config = read_config(smollm2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.vocab_size, config.max_position, config.tie_embeddings) == (49152, 8192, True)
    assert (config.rope_theta, config.weight_type, config.eos_token_ids) == (100000.0, "Q4_1", [2])
    assert config.matrix_types == {"model.embed_tokens": "Q8_0"}


def test_reading_needs_no_torch(smollm2: Path) -> None:
    code = (
        "import sys, pathlib; from llm_runtime.actors.checkpoint import read_config;"
        "from llm_runtime.actors.rank import weight_bytes;"
        "weight_bytes(read_config(pathlib.Path(sys.argv[1])), 'float32', 1, 0); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, smollm2], check=True, cwd=root, timeout=60)


def test_cut_short_anywhere(small_gguf: Path, tmp_path: Path) -> None:
    whole = small_gguf.read_bytes()
    data_start = min(info.offset for info in GGUFFile(small_gguf).tensors.values())
    cut = tmp_path / "cut.gguf"
    lengths = [*range(0, data_start, 37), data_start, len(whole) - 1]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut short|is empty|not a GGUF"):
            GGUFFile(cut)


def test_flipped_bytes(small_gguf: Path, tmp_path: Path) -> None:
    """A damaged header is refused or read as something else; it never ends in another error."""
    whole = small_gguf.read_bytes()
    header = min(info.offset for info in GGUFFile(small_gguf).tensors.values())
    generator = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(300):
        content = bytearray(whole)
        for position in generator.integers(0, header, 3):
            content[position] = generator.choice([0, 255, generator.integers(256)])
        damaged.write_bytes(content)
        try:
            dict(GGUFFile(damaged).metadata)
            read_config(damaged)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "claims 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), "claims 1099511627776 metadata keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 63), "cut short"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        GGUFFile(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_config(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


def hf_config(directory: Path, **changes: Any) -> Path:
    entries = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    }
    entries.update(changes)
    (directory / "config.json").write_text(json.dumps(entries))
    return directory


QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def test_config_of_transformers_4(tmp_path: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    hf_config(tmp_path, rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    config = read_config(tmp_path)
    assert (config.rope_theta, config.weight_type, config.eos_token_ids) == (5e5, "BF16", [7, 2])
    assert config.rope_scaling is not None
    assert config.rope_scaling["rope_type"] == "llama3"
    assert (config.head_dim, config.qkv_bias, config.tie_embeddings) == (16, False, False)


@pytest.mark.parametrize("architectures", [["LLaMAForCausalLM"], [], None])
def test_configurations_as_others_write_them(tmp_path: Path, architectures: list[str] | None) -> None:
    """Nulls, a byte order mark, ends that no token is, an empty generation_config.json."""
    plain = read_config(hf_config(tmp_path))
    nulls = dict.fromkeys(
        ("rope_scaling", "head_dim", "tie_word_embeddings", "attention_bias", "hidden_act", "mlp_bias")
    )
    hf_config(
        tmp_path, architectures=architectures, model_type="llama", eos_token_id=[2, -1, 300], bos_token_id=-1, **nulls
    )
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("")
    assert read_config(tmp_path) == plain


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"eos_token": "</s>", "added_tokens_decoder": {"7": {"content": "</s>"}}}, {}, [2, 7]),
        ({"eos_token": {"content": "</s>"}}, {"added_tokens": [{"content": "</s>", "id": 8}]}, [2, 8]),
        ({"eos_token": "</s>"}, {"added_tokens": [], "model": {"vocab": {"a": 0, "</s>": 9}}}, [2, 9]),
        ({"eos_token": "b"}, {"model": {"vocab": [["a", 0.5], ["b", 0.25]]}}, [2, 1]),
        ({"eos_token": "</s>"}, {"added_tokens": [{"content": "</s>", "id": 300}]}, [2]),
        ({"eos_token": "no"}, {"model": {"vocab": {"a": 0}}}, [2]),
        ({"eos_token": None}, {}, [2]),
    ],
)
def test_the_tokenizers_end_counts_too(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], expected: list[int]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_config(hf_config(tmp_path)).eos_token_ids == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (YARN, 2048),
        ({"type": "yarn", "factor": 4.0}, 2560),
        ({"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512}, 640),
        ({"type": "linear", "factor": 2.0}, 1280),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 80,
            },
            640,
        ),
        ({"rope_type": "default"}, 640),
        ({"factor": 1.0}, 640),
    ],
)
def test_stretched_embeddings_lengthen_the_context(tmp_path: Path, scaling: dict[str, Any], expected: int) -> None:
    config = read_config(hf_config(tmp_path, max_position_embeddings=640, rope_scaling=scaling))
    assert config.max_position == expected


def test_config_of_deepseek_v3(tmp_path: Path) -> None:
    """As the published checkpoints spell it."""
    scaling = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    changes = {**DEEPSEEK, "rope_scaling": scaling, "quantization_config": fp8, "n_group": 4, "topk_group": 2}
    config = read_config(hf_config(tmp_path, **changes, torch_dtype="bfloat16", num_nextn_predict_layers=1))
    assert (config.head_dim, config.rotary_dim, config.num_kv_heads, config.fp8_block) == (32, 16, 4, (128, 128))
    assert config.latent == Latent(q_rank=32, kv_rank=64, rope_dim=16, nope_dim=16, value_dim=16, interleaved=True)
    assert config.experts is not None
    assert (config.experts.layers, config.experts.groups, config.experts.top_groups) == ([1], 4, 2)
    assert config.rope_scaling is not None
    assert config.rope_scaling["mscale_all_dim"] == 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"),
        ({"architectures": []}, "not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a positive number 'factor'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization 'awq'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"hidden_size": 2**40}, "makes no sense"),
        ({"num_hidden_layers": 0}, "makes no sense"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_scaling": {"factor": 4.0}}, "has a factor and no rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rms_norm_eps": 0}, "rms_eps"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size of None is not supported"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; supported is 'sigmoid'"),
        ({**DEEPSEEK, "topk_method": "greedy"}, "topk_method 'greedy'"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({**DEEPSEEK, "kv_lora_rank": 0}, "a kv_rank of 0 makes no sense"),
        ({**DEEPSEEK, "n_group": 3}, "1 of 3 groups cannot be chosen from 8 experts"),
        ({**DEEPSEEK, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 8 to choose from"),
        ({**DEEPSEEK, "hidden_size": 96}, "hidden_size is 96, and with experts it must be a multiple of 64"),
        (
            {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True},
            "attention_bias is not supported where q_lora_rank",
        ),
        ({**DEEPSEEK, "num_key_value_heads": 2}, "num_key_value_heads is 2, and with latent attention it must be"),
        ({**QWEN3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step must be 1 or more, not 0"),
        ({**QWEN3_MOE, "moe_intermediate_size": 0}, "a intermediate_size of 0 makes no sense"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "DeepseekV2ForCausalLM is not supported"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "different kinds"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_config(hf_config(tmp_path, **changes))


def gguf_with(path: Path, arch: str, rope_freqs: np.ndarray[Any, Any] | None = None, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    entries = {
        "embedding_length": 256,
        "block_count": 1,
        "attention.head_count": 2,
        "context_length": 131072,
        "feed_forward_length": 64,
    }
    for key, value in entries.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 500000.0)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", np.zeros((10, 256), np.float32))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(factor: float) -> np.ndarray[Any, Any]:
    """As convert_hf_to_gguf.py writes them (LlamaModel.generate_extra_tensors)."""
    divisors = []
    for frequency in 1.0 / (500000.0 ** (np.arange(0, 128, 2) / 128)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_with_the_rope_of_llama_3(tmp_path: Path, factor: float) -> None:
    config = read_config(gguf_with(tmp_path / "l3.gguf", "llama", llama3_divisors(factor)))
    assert config.rope_scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_gguf_with_another_rope(tmp_path: Path) -> None:
    divisors = llama3_divisors(8.0)
    divisors[40] *= 1.5
    with pytest.raises(CheckpointError, match="a rope scaling other than"):
        read_config(gguf_with(tmp_path / "odd.gguf", "llama", divisors))
    path = gguf_with(tmp_path / "long.gguf", "llama", rope__scaling__type="longrope", rope__scaling__factor=4.0)
    with pytest.raises(CheckpointError, match="rope scaling 'longrope' is not supported"):
        read_config(path)
    with pytest.raises(CheckpointError, match="architecture 'gemma3' is not supported"):
        read_config(gguf_with(tmp_path / "gemma.gguf", "gemma3"))
