"""Rotary tables against the ones of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llm_runtime import kernels

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
]


@pytest.mark.parametrize("scaling", KINDS, ids=lambda scaling: "-".join(map(str, scaling.values())))
def test_like_transformers(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(500)[None])
    for ours, theirs in zip(kernels.rotary_table(64, 500, 10000.0, scaling), expected, strict=True):
        assert ours.shape == (500, 32)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs[0, :, :32], atol=1e-6, rtol=1e-6)


def test_older_name_and_no_scaling() -> None:
    plain, linear = (kernels.rotary_table(8, 20, 1e4, scaling) for scaling in (None, {"type": "linear", "factor": 2.0}))
    torch.testing.assert_close(linear[0][::2], plain[0][:10])


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "longrope"}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2}]
)
def test_rejects_what_it_does_not_know(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rope scaling|needs"):
        kernels.rotary_table(8, 20, 1e4, scaling)
    with pytest.raises(ValueError, match="even"):
        kernels.rotary_table(7, 20, 1e4)
