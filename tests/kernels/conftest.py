"""Fresh random inputs for every run: the seed is printed, and a failing test shows it. KERNEL_TEST_SEED repeats one."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

import kernels


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = int(os.environ.get("KERNEL_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"KERNEL_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(params=["avx512", "avx2", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test in each of the implementations this processor has."""
    name = request.param
    if name != "torch" and name not in kernels.cpu.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("LLM_RUNTIME_KERNELS", name)
    _forget()
    assert kernels.backend() == name
    yield name
    monkeypatch.undo()
    _forget()


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _forget() -> None:
    kernels.cpu.choice.cache_clear()
    kernels.cpu.library.cache_clear()
