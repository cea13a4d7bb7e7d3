"""Every supported architecture and its variants against transformers, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import Driver, generate, rank_config, save_model

from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "llama, one kv head each": ("LlamaForCausalLM", {"num_key_value_heads": 6}),
    "llama, rope llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama, rope linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}},
    ),
    "llama, rope yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 33}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2, window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3, biases": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path: Path, variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    model = save_model(tmp_path, architecture, **overrides)
    executor = build_executor(rank_config(tmp_path, max_model_len=256, num_pages=64))
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, 300, length).tolist() for length in (5, 70, 150)]
    # All logits that a step computes, as the sampler sees them.
    seen: list[torch.Tensor] = []
    compute = executor.model.logits
    executor.model.logits = lambda hidden: seen.append(compute(hidden)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    assert executor.graphs is not None
    run = executor.graphs.run

    def noted_run(*step: Any) -> Any:
        outcome = run(*step)
        seen.extend([] if outcome is None else [outcome[0].clone()])
        return outcome

    executor.graphs.run = noted_run  # type: ignore[method-assign]
    driver = Driver(executor)
    sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    for slot, prompt in enumerate(prompts):
        seen.clear()
        sequence = driver.sequence(slot, prompt, sampling)
        driver.run([sequence])
        with torch.inference_mode():
            wanted = model(torch.tensor([sequence.tokens[:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.cat(seen), wanted, atol=1e-4, rtol=1e-4)
        assert sequence.output == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(tmp_path, "LlamaForCausalLM").to(dtype)
    model.save_pretrained(tmp_path)
    executor = build_executor(rank_config(tmp_path, max_model_len=256, num_pages=64))
    prompt = list(range(40, 80))
    sampling = SamplingParams(max_tokens=6, seed=0, temperature=0.0, logprobs=0)
    (sequence,) = generate(executor, [prompt], sampling)
    with torch.inference_mode():
        logits = model.float()(torch.tensor([sequence.tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert sequence.output == logits.argmax(-1).tolist()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_bfloat16(tmp_path: Path, architecture: str) -> None:
    """As near to float32 as transformers' own bfloat16 is."""
    model = save_model(tmp_path, architecture)
    executor = build_executor(rank_config(tmp_path, dtype="bfloat16", max_model_len=256, num_pages=64))
    prompt = list(range(40, 140))
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=0, prompt_logprobs=0)
    (sequence,) = generate(executor, [prompt], sampling)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        wanted = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        logits = model.bfloat16()(ids).logits[0, :-1].float()
        theirs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    error = (torch.tensor(sequence.prompt_logprobs[1:]) - wanted).abs().mean()
    assert error < 1.5 * (theirs - wanted).abs().mean()
