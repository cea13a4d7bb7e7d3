"""Fresh random inputs for every run: the seed is printed, and a failing test shows it. KERNEL_TEST_SEED repeats one."""

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from llm_runtime import kernels
from llm_runtime.kernels import cpu
from llm_runtime.kernels.cpu import paths


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = int(os.environ.get("KERNEL_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"KERNEL_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that changes the implementation; the usual one is back at the end."""

    def forget() -> None:
        cpu.choice.cache_clear()
        cpu.library.cache_clear()
        paths._table.cache_clear()

    def use(name: str) -> None:
        monkeypatch.setenv("LLM_RUNTIME_KERNELS", name)
        forget()
        assert kernels.backend() == name

    yield use
    monkeypatch.undo()
    forget()


@pytest.fixture(params=["avx512", "avx2", "torch"])
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str], None], threads: None) -> str:
    """Runs a test in each of the implementations this processor has; that of torch with one thread, because it is a
    great number of small operations, at the end of each of which threads wait for one another."""
    if request.param == "torch":
        torch.set_num_threads(1)
    elif request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    use_backend(request.param)
    return request.param


@pytest.fixture(params=["avx512", "avx2"])
def native(request: pytest.FixtureRequest, use_backend: Callable[[str], None]) -> str:
    """Runs a test in each of the C++ implementations this processor has."""
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    use_backend(request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
