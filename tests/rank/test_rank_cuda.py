"""The executor on a CUDA device: against transformers, against the CPU, and its promises about bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_tools import Driver, generate, i32, ints, rank_config, save_model

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.messages import SAMPLE, VERIFY, SamplingParams, Step
from llm_runtime.actors.rank import Executor, build_executor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEEPSEEK: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "window": ("MistralForCausalLM", {"sliding_window": 20}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "deepseek": ("DeepseekV3ForCausalLM", DEEPSEEK),
}
GREEDY = SamplingParams(max_tokens=12, seed=0, temperature=0.0)


def on_cuda(path: Path, **settings: Any) -> Executor:
    defaults: dict[str, Any] = {"device": "cuda", "max_model_len": 512, "num_pages": 512, "max_slots": 17}
    return build_executor(rank_config(path, **{**defaults, **settings}))


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 300, length).tolist() for length in lengths]


def logits_of(executor: Executor) -> list[torch.Tensor]:
    """All logits that the executor computes from now on, copied."""
    seen: list[torch.Tensor] = []
    compute = executor.model.logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        seen.append(logits.clone())
        return logits

    executor.model.logits = noted  # type: ignore[method-assign]
    assert executor.graphs is not None
    run = executor.graphs.run

    def noted_run(*step: Any) -> Any:
        outcome = run(*step)
        seen.extend([] if outcome is None else [outcome[0].clone()])
        return outcome

    executor.graphs.run = noted_run  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path: Path, variant: str, dtype: str) -> None:
    """Of prompts and of recorded decode steps. In bfloat16 the errors are those of transformers in bfloat16."""
    architecture, overrides = VARIANTS[variant]
    model = save_model(tmp_path, architecture, **overrides)
    executor = on_cuda(tmp_path, dtype=dtype)
    seen = logits_of(executor)
    for prompt in prompts_of(5, 70, 150):
        seen.clear()
        (sequence,) = generate(executor, [prompt], GREEDY)
        assert executor.decode_steps
        ids = torch.tensor([sequence.tokens[:-1]])
        with torch.inference_mode():
            exact = model.float().cpu()(ids).logits[0, len(prompt) - 1 :]
        ours = torch.cat(seen).cpu()
        error = (ours - exact).norm() / exact.norm()
        if dtype == "float32":
            assert error < 1e-4
            assert sequence.output == exact.argmax(-1).tolist()
        else:
            with torch.inference_mode():
                rounded = model.bfloat16().cuda()(ids.cuda()).logits[0, len(prompt) - 1 :].float().cpu()
            assert error < 1.5 * (rounded - exact).norm() / exact.norm() + 5e-3


@pytest.mark.parametrize("variant", ["llama", "deepseek"])
def test_the_same_tokens_as_on_the_cpu(tmp_path: Path, variant: str) -> None:
    """Also drawn at random, with logprobs, penalties, in chunks and alone, and with steps run twice."""
    architecture, overrides = VARIANTS[variant]
    save_model(tmp_path, architecture, **overrides)
    prompts = prompts_of(1, 16, 17, 64, 100, 129, 250)
    here = build_executor(rank_config(tmp_path, max_model_len=512, num_pages=512, max_slots=17))
    there = on_cuda(tmp_path)
    for sampling in (
        GREEDY,
        SamplingParams(max_tokens=12, seed=5, temperature=0.8, top_p=0.95, logprobs=3),
        SamplingParams(max_tokens=12, seed=5, temperature=0.0, repetition_penalty=1.2, logit_bias={7: 2.0}),
    ):
        wanted = [sequence.output for sequence in generate(here, prompts, sampling)]
        hows: list[dict[str, Any]] = [{}, {"alone": True}, {"chunk": 13}, {"repeat": True}]
        for how in hows:
            outputs = [sequence.output for sequence in generate(there, prompts, sampling, **how)]
            assert outputs == wanted, (sampling, how)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")]
)
def test_deterministic_bits(tmp_path: Path, dtype: str, kv_dtype: str) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    executor = on_cuda(tmp_path, dtype=dtype, kv_dtype=kv_dtype, deterministic=True)
    prompts = prompts_of(1, 16, 17, 100, 150)
    sampling = SamplingParams(max_tokens=8, seed=5, logprobs=20)
    expected = [(each.output, each.logprobs) for each in generate(executor, prompts, sampling)]
    for how in ({"chunk": 13}, {"repeat": True}):
        again = [(each.output, each.logprobs) for each in generate(executor, prompts, sampling, **how)]
        assert [output for output, _ in again] == [output for output, _ in expected]
        assert [[e.logprobs for e in entries] for _, entries in again] == [
            [e.logprobs for e in entries] for _, entries in expected
        ]


def test_int8_cache(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)
    exact, close = (
        np.concatenate(
            [
                each.prompt_logprobs[1:]
                for each in generate(on_cuda(tmp_path, kv_dtype=kv), prompts_of(150, 200), sampling)
            ]
        )
        for kv in ("float32", "int8")
    )
    assert 0 < np.abs(exact - close).mean() < 0.03


def test_rows_to_verify(tmp_path: Path) -> None:
    """A right guess and a wrong one, of a row that is a part of a small recorded step."""
    save_model(tmp_path, "LlamaForCausalLM")
    executor = on_cuda(tmp_path)
    (prompt,) = prompts_of(40)
    (wanted,) = generate(executor, [prompt], GREEDY)
    executor.reset()
    driver = Driver(executor)
    sequence = driver.sequence(3, prompt, GREEDY)
    rows = [(sequence, len(prompt))]
    step = driver.step(rows)
    driver.apply(rows, step, executor.execute(step))
    guesses = [wanted.output[1], wanted.output[2], (wanted.output[3] + 1) % 300]
    result = executor.execute(
        Step(
            driver.number + 1,
            i32([3]),
            i32([len(prompt)]),
            i32([4]),
            bytes([SAMPLE | VERIFY]),
            i32([wanted.output[0], *guesses]),
        )
    )
    assert ints(result.tokens)[:3] == wanted.output[1:4]


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "MixtralForCausalLM"])
def test_models_of_transformers(tmp_path: Path, architecture: str) -> None:
    more: dict[str, Any] = {"pad_token_id": 0, "hidden_size": 192} if architecture == "Phi3ForCausalLM" else {}
    save_model(tmp_path, architecture, **more)
    here, there = (
        generate(
            build_executor(rank_config(tmp_path, max_model_len=256, num_pages=128, max_slots=4, device=device)),
            prompts_of(5, 40, 150),
            GREEDY,
        )
        for device in ("cpu", "cuda")
    )
    assert [each.output for each in there] == [each.output for each in here]


def test_a_pool_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "LlamaForCausalLM")
    monkeypatch.setattr("llm_runtime.actors.rank.device.PATIENCE_S", 0.3)
    with pytest.raises(StartFailure, match=r"a KV pool of \S+ GiB does not fit into .* GiB are free: lower kv_tokens"):
        on_cuda(tmp_path, num_pages=100_000_000)
