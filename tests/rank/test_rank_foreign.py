"""Models that transformers' own implementation runs over the pages of a rank, and those that it cannot run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import PAGE_SIZE, Driver, generate, rank_config, save_model

from llm_runtime import kernels
from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import CheckpointError, read_config
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor, weight_bytes
from llm_runtime.transport import Arena

SAMPLING = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logprobs=0)
VARIANTS: dict[str, dict[str, Any]] = {
    "Phi3ForCausalLM": {"pad_token_id": 0, "hidden_size": 192},
    "MixtralForCausalLM": {"num_local_experts": 4, "sliding_window": 20},
    "GraniteForCausalLM": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "tie_word_embeddings": True},
    "GPT2LMHeadModel": {"pad_token_id": 0, "num_key_value_heads": 6},
    "OPTForCausalLM": {"ffn_dim": 160, "word_embed_proj_dim": 96, "pad_token_id": 0, "num_key_value_heads": 6},
    "GPTNeoXForCausalLM": {"num_key_value_heads": 6},
}
SETTINGS: dict[str, Any] = {"max_model_len": 256, "num_pages": 64}


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, 300, length).tolist() for length in (5, 70, 150)]


@pytest.mark.parametrize("architecture", VARIANTS)
def test_tokens(tmp_path: Path, architecture: str) -> None:
    """Batched, in chunks, after a prefix of another; and from the arena of a former incarnation."""
    theirs = save_model(tmp_path, architecture, **VARIANTS[architecture])
    config = rank_config(tmp_path, **SETTINGS)
    arena = Arena.create("weights", weight_bytes(read_config(tmp_path), "float32", 1, 0))
    for file in (None, "model.safetensors"):
        if file is not None:  # what a former incarnation has read need not be there
            (tmp_path / file).unlink()
        driver = Driver(build_executor(config, weights=arena))
        sequences = [driver.sequence(slot, prompt, SAMPLING) for slot, prompt in enumerate(prompts())]
        driver.run(sequences, chunk=40)
        shared = sequences[2].pages[: 149 // PAGE_SIZE]
        sequences.append(driver.sequence(3, prompts()[2], SAMPLING, shared))
        driver.run(sequences[3:])
        for sequence in sequences:
            with torch.inference_mode():
                logits = theirs(torch.tensor([sequence.tokens[:-1]])).logits[0, len(sequence.prompt) - 1 :]
            assert sequence.output == logits.argmax(-1).tolist()
            wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(sequence.output)[:, None])[:, 0]
            got = np.concatenate([np.frombuffer(entry.logprobs, np.float32) for entry in sequence.logprobs])
            np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_bfloat16(tmp_path: Path) -> None:
    theirs = save_model(tmp_path, "MixtralForCausalLM", num_local_experts=2)
    (ours,) = generate(build_executor(rank_config(tmp_path, dtype="bfloat16", **SETTINGS)), prompts()[1:2], SAMPLING)
    with torch.inference_mode():
        logits = theirs(torch.tensor([ours.tokens[:-1]])).logits[0, len(ours.prompt) - 1 :]
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(ours.output)[:, None])[:, 0]
    got = np.concatenate([np.frombuffer(entry.logprobs, np.float32) for entry in ours.logprobs])
    assert 0 < np.abs(got - wanted.numpy()).max() < 0.2


@pytest.mark.parametrize(
    ("architecture", "settings", "sentence"),
    [
        ("MambaForCausalLM", {}, "MambaForCausalLM is not supported, for its attention in transformers cannot be"),
        ("BloomForCausalLM", {}, "BloomForCausalLM is not supported, for its attention in transformers cannot be"),
        ("GptOssForCausalLM", {}, r"implementation: its attention is not plain causal attention \(s_aux\)"),
        ("GPTNeoXForCausalLM", {}, r"implementation: its keys \(6, 16\) and values \(6, 16\) are not \(2, 16\)"),
        ("Olmo2ForCausalLM", {"deterministic": True}, "set deterministic to false"),
        ("Olmo2ForCausalLM", {"dtype": "int4"}, 'which has no int4: set model.dtype to "bfloat16"'),
        ("Olmo2ForCausalLM", {"tp": 2, "process_group_dir": "/tmp"}, "on one rank: set tp to 1"),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, architecture: str, settings: dict[str, Any], sentence: str) -> None:
    save_model(
        tmp_path,
        architecture,
        num_hidden_layers=1,
        **({"num_local_experts": 4, "head_dim": 16} if "Oss" in architecture else {}),
    )
    with pytest.raises((CheckpointError, StartFailure), match=sentence):
        build_executor(rank_config(tmp_path, **SETTINGS, **settings))


def test_another_result_over_pages_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of earlier steps are forgotten, say."""
    save_model(tmp_path, "Olmo2ForCausalLM", num_hidden_layers=1)
    attention = kernels.attention
    monkeypatch.setattr(
        kernels, "attention", lambda q, k, v, cache, *rest, **others: attention(q, k, v, cache.zero_(), *rest, **others)
    )
    with pytest.raises(StartFailure, match="over pages of keys and values it computes something else"):
        build_executor(rank_config(tmp_path, **SETTINGS))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Olmo2ForCausalLM", num_hidden_layers=1)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r'and others after `pip install "transformers>=5\.12,<6"`'):
        read_config(tmp_path)
