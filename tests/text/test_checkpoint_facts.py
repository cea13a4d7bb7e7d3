"""What a checkpoint's files say about themselves."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_runtime.actors.checkpoint import CheckpointFacts, checkpoint_facts


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "rope_theta": 1e6,
        "architectures": ["x"],
        "head_dim": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros((4, 8), np.float16), "b": np.zeros(8, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"c": np.zeros((2, 3), np.float16)}, tmp_path / "model-2.safetensors")
    return tmp_path


def test_a_directory(directory: Path) -> None:
    facts = checkpoint_facts(directory)
    assert (facts.format, facts.architecture, facts.type, facts.parameters) == ("safetensors", "qwen3", "F16", 46)
    assert facts.size == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert facts.metadata == {
        "general.architecture": "qwen3",
        "general.parameter_count": 46,
        "qwen3.block_count": 2,
        "qwen3.rope.freq_base": 1e6,
    }
    assert len(facts.digest) == 64
    assert facts.digest == checkpoint_facts(directory).digest
    (directory / "model-2.safetensors").unlink()
    assert facts.digest != checkpoint_facts(directory).digest


@pytest.mark.parametrize(("file_type", "name"), [(15, "Q4_K_M"), (None, "F16")])
def test_a_gguf_file(tmp_path: Path, file_type: int | None, name: str) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_string("tokenizer.chat_template", "x" * 1000)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("a", np.zeros((4, 32), np.float16))
    writer.add_tensor("b", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = checkpoint_facts(path)
    assert (facts.format, facts.architecture, facts.type, facts.parameters) == ("gguf", "llama", name, 132)
    assert facts.metadata["llama.block_count"] == 3
    assert not [key for key in facts.metadata if key.startswith("tokenizer.")]
    assert facts.modified_at == int(path.stat().st_mtime)


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"a": {}}', b'{"a": {"dtype": 1, "shape": 5}}', b"{", b'{"a": 1}'])
def test_what_cannot_be_read_is_left_to_others(directory: Path, header: bytes) -> None:
    (directory / "model-1.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    facts = checkpoint_facts(directory)
    assert facts == CheckpointFacts() or facts.parameters == 6
    (directory / "model-1.safetensors").write_bytes(b"")
    assert checkpoint_facts(directory) == CheckpointFacts()
    (directory / "config.json").write_text("[]")
    assert checkpoint_facts(directory) == CheckpointFacts()
    assert checkpoint_facts(directory / "nothing") == CheckpointFacts()
