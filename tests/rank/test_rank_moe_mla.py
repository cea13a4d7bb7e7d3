"""Latent attention and mixtures of experts against transformers, on tiny random models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import PAGE_SIZE, Driver, Sequence, rank_config, save_model

from actors.messages import SamplingParams
from actors.rank import Executor, build_executor

EXPERTS: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 48,  # not a multiple of the panels: zeros fill them
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
DEEPSEEK: dict[str, Any] = {
    **EXPERTS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 72,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_group": 4,
    "topk_group": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek, yarn": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "rope_parameters": YARN}),
    "deepseek, no rank of queries": (
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "deepseek, halves, biases": (
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "rope_interleave": False, "attention_bias": True},
    ),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        {
            **{key: EXPERTS[key] for key in ("hidden_size", "num_hidden_layers", "moe_intermediate_size")},
            "num_attention_heads": 4,
            "head_dim": 32,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "qwen3 moe, some dense": (
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 128,
            "num_hidden_layers": 5,
            "moe_intermediate_size": 64,
            "num_attention_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "glm4 moe": ("Glm4MoeForCausalLM", {**EXPERTS, "num_attention_heads": 4, "head_dim": 32, "attention_bias": True}),
    "glm4 moe, norms of heads": (
        "Glm4MoeForCausalLM",
        {**EXPERTS, "num_attention_heads": 4, "head_dim": 24, "use_qk_norm": True, "partial_rotary_factor": 0.25},
    ),
}


def save(directory: Path, variant: str) -> Any:
    """A model whose router prefers some experts: their corrections differ."""
    architecture, overrides = VARIANTS[variant]
    model = save_model(directory, architecture, **overrides)
    with torch.no_grad():
        for name, values in model.named_buffers():
            if "e_score_correction_bias" in name:
                values.copy_(torch.randn_like(values) * 0.05)
    model.save_pretrained(directory)
    return model


@dataclass
class Noted:
    """An executor, and all logits that it computes."""

    executor: Executor
    logits: list[torch.Tensor]


def noted(directory: Path, **settings: Any) -> Noted:
    executor = build_executor(rank_config(directory, **{"max_model_len": 256, "num_pages": 128, **settings}))
    seen: list[torch.Tensor] = []
    compute = executor.model.logits
    executor.model.logits = lambda hidden: seen.append(compute(hidden)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    executor.graphs = None  # which keep their logits
    return Noted(executor, seen)


def prompts(count: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 300, length).tolist() for length in (5, 150, 70)[:count]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path: Path, variant: str) -> None:
    """Whole, in chunks, and with a prefix that another sequence has computed."""
    model = save(tmp_path, variant)
    ours = noted(tmp_path)
    driver = Driver(ours.executor)
    sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    slot = 0
    for prompt in prompts():
        ours.logits.clear()
        wanted = torch.empty(0)
        for chunk, shares in ((1 << 30, False), (40, False), (1 << 30, True)):
            shared = sequence.pages[: (len(prompt) - 1) // PAGE_SIZE] if shares else None  # noqa: F821
            sequence: Sequence = driver.sequence(slot, prompt, sampling, shared)
            slot += 1
            driver.run([sequence], chunk=chunk)
            if not len(wanted):
                with torch.inference_mode():
                    wanted = model(torch.tensor([sequence.tokens[:-1]])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.cat(ours.logits[-4:]), wanted, atol=1e-4, rtol=1e-4)
            assert sequence.output == wanted.argmax(-1).tolist()
