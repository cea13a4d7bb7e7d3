"""Latent attention and mixtures of experts against transformers, on tiny random models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import PAGE_SIZE, Driver, Sequence, generate, rank_config, save_model
from safetensors.torch import load, save_file
from test_rank_group import run_group

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.checkpoint import CheckpointError, read_config
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import Executor, build_executor
from llm_runtime.actors.rank.checkpoint_reader import open_checkpoint

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


SAMPLING = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logprobs=3)


def logprobs_of(sequences: list[Sequence]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.frombuffer(e.logprobs, np.float32) for each in sequences for e in each.logprobs])


@pytest.mark.parametrize("variant", ["deepseek, yarn", "glm4 moe"])
def test_batched(tmp_path: Path, variant: str) -> None:
    """Rows of long prompts beside decoding ones, and all forms of attention in one step."""
    model = save(tmp_path, variant)
    executor = build_executor(rank_config(tmp_path, max_model_len=256, num_pages=128))
    driver = Driver(executor)
    early = driver.sequence(0, prompts()[0], SAMPLING)
    driver.run([early])
    early.sampling = SamplingParams(max_tokens=11, seed=0, temperature=0.0, logprobs=3)
    early.pages.append(driver.next_page)
    driver.next_page += 1
    late = [driver.sequence(slot, prompt, SAMPLING) for slot, prompt in enumerate(prompts(), 1)]
    step = driver.step([(early, 1), *((each, len(each.prompt)) for each in late)])
    rows = [(early, 1), *((each, len(each.prompt)) for each in late)]
    driver.apply(rows, step, executor.execute(step))
    driver.run(late)
    for sequence in (early, *late):
        ids = torch.tensor([sequence.tokens[:-1]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(sequence.prompt) - 1 :]
        assert sequence.output == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("variant", "dtype"), [("deepseek, yarn", "float32"), ("qwen3 moe", "int8")])
def test_deterministic(tmp_path: Path, variant: str, dtype: str) -> None:
    """To the bit the same alone, batched, in chunks, and run twice."""
    save(tmp_path, variant)
    executor = build_executor(rank_config(tmp_path, max_model_len=256, num_pages=128, dtype=dtype, deterministic=True))
    together = generate(executor, prompts(), SAMPLING)
    for how in ({"alone": True}, {"chunk": 23}, {"repeat": True, "chunk": 64}):
        again = generate(executor, prompts(), SAMPLING, **how)
        for first, second in zip(together, again, strict=True):
            assert first.output == second.output
            assert [entry.logprobs for entry in first.logprobs] == [entry.logprobs for entry in second.logprobs]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("deepseek, yarn", "bfloat16"), ("deepseek, no rank of queries", "float32"), ("glm4 moe", "int8")],
)
def test_kernel_graphs_change_no_bit(tmp_path: Path, variant: str, dtype: str) -> None:
    save(tmp_path, variant)
    outputs = []
    for graphs in (True, False):
        executor = build_executor(rank_config(tmp_path, max_model_len=256, num_pages=128, dtype=dtype))
        if not graphs:
            executor.graphs = None
        sequences = generate(executor, prompts(), SAMPLING)
        assert bool(executor.decode_steps) == graphs
        outputs.append([(sequence.output, sequence.logprobs) for sequence in sequences])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("variant", ["deepseek, yarn", "glm4 moe"])
def test_two_ranks(tmp_path: Path, variant: str) -> None:
    """48 features of an expert: 32 on the first rank, and 16 on the other."""
    model = tmp_path / "model"
    save(model, variant)
    run = {"prompts": prompts(), "sampling": {"max_tokens": 5, "seed": 0, "temperature": 0.0, "logprobs": 3}}
    (results,) = run_group(model, tmp_path, 2, [{**run, "how": {"chunk": 64}}], max_model_len=256, num_pages=128)
    alone = generate(build_executor(rank_config(model, max_model_len=256, num_pages=128)), prompts(), SAMPLING)
    assert [output for output, _ in results] == [sequence.output for sequence in alone]
    got = [np.frombuffer(bytes.fromhex(entry), np.float32)[0] for _, entries in results for entry in entries]
    np.testing.assert_allclose(got, logprobs_of(alone), atol=1e-4)


@pytest.mark.parametrize("variant", ["deepseek, yarn", "qwen3 moe"])
def test_dtypes(tmp_path: Path, variant: str) -> None:
    """Logprobs of a prompt are near those in float32; transformers' own error in bfloat16 is the measure."""
    model = save(tmp_path, variant)
    prompt = prompts()[1]
    ids = torch.tensor([prompt])
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)

    def of_theirs() -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            values: np.ndarray[Any, Any] = (
                torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0].numpy()
            )
        return values

    exact = of_theirs()
    model.bfloat16()
    theirs = np.abs(of_theirs() - exact).mean()
    for dtype, kv_dtype, times in (
        ("float32", "bfloat16", 1),
        ("bfloat16", None, 1.5),
        ("int8", None, 4),
        ("int4", None, 30),
    ):
        config = rank_config(tmp_path, max_model_len=256, num_pages=32, dtype=dtype, kv_dtype=kv_dtype)
        (ours,) = generate(build_executor(config), [prompt], sampling)
        error = np.abs(np.array(ours.prompt_logprobs[1:]) - exact).mean()
        assert 0 < error < times * theirs


def test_no_int8_cache_of_latents(tmp_path: Path) -> None:
    save(tmp_path, "deepseek, yarn")
    with pytest.raises(StartFailure, match="int8 is not possible with latent attention: set kv_dtype to"):
        build_executor(rank_config(tmp_path, max_model_len=256, kv_dtype="int8"))


def quantize(directory: Path, block: tuple[int, int]) -> None:
    """Rewrites a checkpoint with matrices of FP8 numbers, and a copy of it, beside it, with their values as floats."""
    high, wide = block
    stored = load((directory / "model.safetensors").read_bytes())
    twin = directory.with_name("twin")
    twin.mkdir()
    floats = dict(stored)
    for name, values in list(stored.items()):
        if values.dim() != 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            continue
        rows, columns = values.shape
        padded = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
        blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        factors = blocks.abs().amax((1, 3)) / 448
        stored[name] = (
            (blocks / factors[:, None, :, None])
            .flatten(2)
            .flatten(0, 1)[:rows, :columns]
            .to(torch.float8_e4m3fn)
            .contiguous()
        )
        stored[f"{name}_scale_inv"] = factors
        each = factors.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
        floats[name] = stored[name].float() * each
    stored["model.layers.3.eh_proj.weight"] = torch.zeros(8, 16)  # of the layer that predicts a second token
    save_file(stored, directory / "model.safetensors")
    save_file(floats, twin / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    (directory / "config.json").write_text(json.dumps(config))


def test_fp8(tmp_path: Path) -> None:
    """To the bit as the same numbers stored as floats, also in parts that begin and end within blocks."""
    model = tmp_path / "model"
    save(model, "deepseek, yarn")
    quantize(model, (32, 40))
    configs = [rank_config(path, max_model_len=256, num_pages=64) for path in (model, tmp_path / "twin")]
    ours, twin = (generate(build_executor(config), prompts(2), SAMPLING) for config in configs)
    assert [each.output for each in ours] == [each.output for each in twin]
    assert (logprobs_of(ours) == logprobs_of(twin)).all()
    source = open_checkpoint(model, read_config(model))
    name, shape = "model.layers.1.self_attn.kv_b_proj.weight", (4 * 44, 64)
    whole = source.read(name, shape, range(shape[0]), range(shape[1]))
    for rows, columns in ((range(32, 64), range(40)), (range(33, 34), range(39, 41)), (range(150, 176), range(7, 64))):
        part = source.read(name, shape, rows, columns)
        assert torch.equal(part, whole[rows.start : rows.stop, columns.start : columns.stop])


def test_fp8_without_factors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save(model, "deepseek, yarn")
    quantize(model, (128, 128))
    stored = load((model / "model.safetensors").read_bytes())
    del stored["model.layers.2.mlp.experts.7.up_proj.weight_scale_inv"]
    save_file(stored, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.layers.2.mlp.experts.7.up_proj.weight_scale_inv'"):
        build_executor(rank_config(model, max_model_len=256))
