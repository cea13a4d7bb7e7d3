"""Loading: ggml's types, llama.cpp's order of rows, sharded safetensors, and the arena that outlives a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rank_tools import generate, rank_config, save_model

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import CheckpointError, read_config
from llm_runtime.actors.checkpoint.gguf import BLOCKS
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor, shard_of, weight_bytes
from llm_runtime.actors.rank import checkpoint_reader as source_module
from llm_runtime.actors.rank.checkpoint_reader import open_checkpoint
from llm_runtime.actors.rank.dequantize import DEQUANTIZERS, dequantize
from llm_runtime.actors.rank.shard import HEADER_BYTES, PANEL_ROWS, split, weight_layout
from llm_runtime.actors.rank.weights import load_weights
from llm_runtime.transport import Arena

SAMPLING = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logprobs=0)
PROMPT = list(range(30, 60))


@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_dequantize(name: str) -> None:
    _, values, size = next(block for block in BLOCKS.values() if block[0] == name)
    raw = np.random.default_rng(0).integers(0, 256, (64, 6, size), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw.reshape(64, -1), kind).astype(np.float32)
    got = dequantize(name, torch.from_numpy(raw)).numpy()
    assert got.shape == (64, 6 * values)
    np.testing.assert_array_equal(got, wanted)


def write_gguf(path: Path, model: Any, kind: str = "F32", **metadata: int) -> None:
    """A Llama of transformers as llama.cpp would store it, its matrices in one ggml type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    quantization = gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # convert_hf_to_gguf.py, LlamaModel.permute
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2:
            packed = gguf.quantize(np.ascontiguousarray(values), quantization)
            writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_llama(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path / "hf", "LlamaForCausalLM", intermediate_size=192)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, kind)
    quantization = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                packed = gguf.quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.from_numpy(gguf.dequantize(packed, quantization).astype(np.float32)))
    (sequence,) = generate(build_executor(rank_config(path, max_model_len=128)), [PROMPT], SAMPLING)
    with torch.inference_mode():
        logits = model(torch.tensor([sequence.tokens[:-1]])).logits[0, len(PROMPT) - 1 :]
    assert sequence.output == logits.argmax(-1).tolist()
    values = torch.log_softmax(logits, -1)
    for entry, row, token in zip(sequence.logprobs, values, sequence.output, strict=True):
        np.testing.assert_allclose(np.frombuffer(entry.logprobs, np.float32), [row[token]], atol=1e-4)


def test_parts_of_quantized_tensors(tmp_path: Path) -> None:
    """Columns need not begin where a block does."""
    path = tmp_path / "model.gguf"
    write_gguf(path, save_model(tmp_path / "hf", "LlamaForCausalLM"), "Q8_0")
    source = open_checkpoint(path, read_config(path))
    name, shape = "model.layers.1.self_attn.o_proj.weight", (96, 96)
    whole = source.read(name, shape, range(96), range(96))
    assert torch.equal(source.read(name, shape, range(5, 50), range(48, 90)), whole[5:50, 48:90])
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = source.read(name, shape, range(96), range(96))
    assert torch.equal(source.read(name, shape, range(16, 48), range(96)), whole[16:48])


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = save_model(tmp_path / "one", "Qwen2ForCausalLM")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (
        generate(build_executor(rank_config(tmp_path / name, max_model_len=128)), [PROMPT], SAMPLING)[0]
        for name in ("one", "many")
    )
    assert (one.output, one.logprobs) == (many.output, many.logprobs)


def test_damaged_safetensors(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    config = rank_config(tmp_path, max_model_len=128)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_executor(config)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"a \*.safetensors file is missing"):
        build_executor(config)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file beside it"):
        build_executor(config)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"a \*.safetensors file is missing"):
        build_executor(config)


def test_wrong_shape_and_wrong_type(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 96', '"hidden_size": 192'))
    with pytest.raises(CheckpointError, match="has the shape"):
        build_executor(rank_config(tmp_path, max_model_len=128))


# -- shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 31, 192, 1536, 49152, 151936])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_split(total: int, parts: int) -> None:
    ranges = [split(total, parts, part, 32) for part in range(parts)]
    assert [index for part in ranges for index in part] == list(range(total))
    lengths = [len(part) for part in ranges]
    assert max(lengths) - min(lengths) <= 32
    assert total < parts or min(lengths) > 0


def test_shards_of_smollm2(smollm2: Path) -> None:
    config = read_config(smollm2)
    first, second = (shard_of(config, 2, rank) for rank in (0, 1))
    assert (first.kv_heads, second.kv_heads) == (range(2), range(2, 3))
    assert (first.heads, second.heads) == (range(6), range(6, 9))
    assert (first.intermediate, second.intermediate) == (range(768), range(768, 1536))
    with pytest.raises(StartFailure, match="tp = 4 is not possible, for the model has 3 key-value heads"):
        shard_of(config, 4, 0)
    whole, half = weight_bytes(config, "float32", 1, 0), weight_bytes(config, "float32", 2, 1)
    assert weight_bytes(config, "bfloat16", 1, 0) < 0.51 * whole
    assert half < 0.7 * whole


def test_panels_are_those_of_the_kernels() -> None:
    from llm_runtime import kernels

    assert kernels.pack_weight(torch.zeros(65, 3)).panels.shape == (2, 3, PANEL_ROWS)


# -- arenas --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tmp_path, "LlamaForCausalLM")
    return tmp_path


def arena_for(checkpoint: Path) -> int:
    return Arena.create("weights", weight_bytes(read_config(checkpoint), "float32", 1, 0))


def test_second_executor_reads_no_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rank_config(checkpoint, max_model_len=128)
    descriptor = arena_for(checkpoint)
    (first,) = generate(build_executor(config, descriptor), [PROMPT], SAMPLING)
    assert Arena(descriptor, private=True).sealed
    monkeypatch.setattr(source_module, "SafetensorsSource", None)
    (second,) = generate(build_executor(config, descriptor), [PROMPT], SAMPLING)
    assert (first.output, first.logprobs) == (second.output, second.logprobs)


def test_killed_while_packing(checkpoint: Path) -> None:
    """A process is killed after some of the tensors; the next packs again."""
    config = rank_config(checkpoint, max_model_len=128)
    descriptor = arena_for(checkpoint)
    child = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from llm_runtime.actors.checkpoint import read_config
        from llm_runtime.actors.rank import weights
        from llm_runtime.actors.rank.shard import shard_of
        fill, left = weights._fill, [12]
        def fill_some(*arguments):
            fill(*arguments)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        weights._fill = fill_some
        path = Path(sys.argv[1])
        config = read_config(path)
        weights.load_weights(path, config, "float32", shard_of(config, 1, 0), sys.argv[3] == "True", int(sys.argv[2]))
        """
    )
    from llm_runtime import kernels

    packed = str(kernels.backend() != "torch")
    process = subprocess.run(
        [sys.executable, "-c", child, str(checkpoint), str(descriptor), packed],
        pass_fds=[descriptor],
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL
    assert any(Arena(descriptor, private=True).buffer[HEADER_BYTES:])
    assert not Arena(descriptor, private=True).sealed
    (again,) = generate(build_executor(config, descriptor), [PROMPT], SAMPLING)
    (wanted,) = generate(build_executor(config), [PROMPT], SAMPLING)
    assert (again.output, again.logprobs) == (wanted.output, wanted.logprobs)


def test_killed_between_ready_and_seal(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rank_config(checkpoint, max_model_len=128)
    descriptor = arena_for(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Arena, "seal", lambda self: None)
        build_executor(config, descriptor)
    assert not Arena(descriptor, private=True).sealed
    build_executor(config, descriptor)
    assert Arena(descriptor, private=True).sealed


def test_arena_that_does_not_fit(checkpoint: Path) -> None:
    config = rank_config(checkpoint, max_model_len=128)
    with pytest.raises(StartFailure, match="weights arena has 8192 bytes"):
        build_executor(config, Arena.create("weights", 8192))
    with pytest.raises(StartFailure, match="KV arena has 8192 bytes"):
        build_executor(config, None, Arena.create("kv", 8192))


def test_arena_of_another_configuration(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    descriptor = arena_for(checkpoint)
    shard = shard_of(config, 1, 0)
    load_weights(checkpoint, config, "float32", shard, True, descriptor)
    with pytest.raises(StartFailure, match="restart the engine"):
        load_weights(checkpoint, config, "bfloat16", shard, True, descriptor)
    with pytest.raises(StartFailure, match="restart the engine"):
        load_weights(checkpoint, config, "float32", shard, False, descriptor)


def test_changed_file_does_not_stop_a_restart(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = rank_config(checkpoint, max_model_len=128)
    descriptor = arena_for(checkpoint)
    build_executor(config, descriptor)
    os.utime(checkpoint / "model.safetensors", (1, 1))
    build_executor(config, descriptor)
    assert "files have changed" in caplog.text


def test_layout_has_no_overlap(smollm2: Path) -> None:
    config = read_config(smollm2)
    for tp, rank in ((1, 0), (2, 1), (3, 2)):
        for packed in (False, True):
            slots, size = weight_layout(config, "bfloat16", shard_of(config, tp, rank), packed)
            ends = [slot.offset + slot.nbytes for slot in slots]
            assert all(end <= slot.offset for end, slot in zip(ends, slots[1:], strict=False))
            assert ends[-1] <= size <= weight_bytes(config, "bfloat16", tp, rank)
