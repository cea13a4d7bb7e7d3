"""Linear layers: close to float64, and a row's result the same to the bit whatever the other rows are."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from llm_runtime import kernels
from llm_runtime.kernels import cpu, reference
from llm_runtime.kernels.cpu import functions
from llm_runtime.kernels.cpu.compile import EXTENSIONS, processor_flags

SHAPES = [(1, 1), (17, 33), (64, 64), (576, 960), (129, 200), (1536, 70)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_against_float64(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    for rows in (0, 1, 5, 13, 97):
        x = torch.randn(rows, inputs).to(dtype)
        for added in (None, bias):
            exact = x.double() @ weight.double().T + (0 if added is None else added.double())
            tolerance = 1e-6 * inputs**0.5 + 1e-6 if dtype == torch.float32 else 1e-5 * inputs**0.5
            rounding = 1e-5 if dtype == torch.float32 else 1e-2
            for given, deterministic in ((weight, True), (kernels.pack_weight(weight), True), (weight, False)):
                out = kernels.linear(x, given, added, deterministic=deterministic)
                assert out.dtype == dtype
                torch.testing.assert_close(out.double(), exact, atol=tolerance * 5, rtol=rounding)


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_same_bits_in_any_batch(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    packed = kernels.pack_weight(weight)
    x = torch.randn(150, inputs).to(dtype)
    torch.set_num_threads(1)
    whole = kernels.linear(x, packed, bias, deterministic=True)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for given in (packed, weight):
            for _ in range(4):
                start = random.randrange(150)
                end = min(150, start + random.choice([1, 2, 3, 16, 100]))
                part = kernels.linear(x[start:end], given, bias, deterministic=True)
                assert torch.equal(part, whole[start:end]), f"rows {start} to {end}, {count} threads"
        shuffled = torch.randperm(150)
        assert torch.equal(kernels.linear(x[shuffled], packed, bias), whole[shuffled])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["plain", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_wide_result_is_what_a_narrow_one_is_rounded_from(kind: str, deterministic: bool) -> None:
    weight, bias = torch.randn(200, 96).bfloat16(), torch.randn(200).bfloat16()
    given = weight if kind == "plain" else kernels.pack_weight(weight, kind=kind)  # type: ignore[arg-type]
    for rows in (0, 1, 3, 40):
        x = torch.randn(rows, 96).bfloat16()
        wide = kernels.linear(x, given, bias, deterministic, wide=True)
        assert wide.dtype == torch.float32
        narrow = kernels.linear(x, given, bias, deterministic)
        if kernels.backend() == "torch":  # its products of bfloat16 add in another order than those of float32
            torch.testing.assert_close(wide.bfloat16(), narrow, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(wide.bfloat16(), narrow)
        if rows and kind != "plain" and kernels.backend() != "torch":
            assert not torch.equal(wide, wide.bfloat16().float()), "it was rounded"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_weight_of_another_type(inputs: int, outputs: int) -> None:
    """As a layer has that cannot be quantized: sums are float32, and only the result is rounded to x's type."""
    for x_type, kind in ((torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
        packed = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
        x, bias = torch.randn(40, inputs).bfloat16().to(x_type), torch.randn(outputs).to(x_type)
        exact = x.double() @ reference.dequantize(packed).double().T + bias.double()
        whole = kernels.linear(x, packed, bias)
        assert whole.dtype == x_type
        rounding = 1e-5 if x_type == torch.float32 else 1e-2
        torch.testing.assert_close(whole.double(), exact, atol=5e-6 * inputs**0.5 + 5e-6, rtol=rounding)
        assert torch.equal(kernels.linear(x[7:9], packed, bias), whole[7:9])


@pytest.mark.usefixtures("backend")
def test_strided_rows_and_shared_panels() -> None:
    x, weight = torch.randn(9, 300)[:, 100:200], torch.randn(130, 100)
    arena = torch.full((3 * 100 * 64 + 5,), torch.nan)
    packed = kernels.pack_weight(weight, arena[5:].view(3, 100, 64))
    assert packed.panels.data_ptr() == arena[5:].data_ptr()
    assert not arena[5:].isnan().any()
    expected = kernels.linear(x.contiguous(), kernels.pack_weight(weight))
    assert torch.equal(kernels.linear(x, packed), expected)
    again = kernels.PackedWeight(packed.panels.clone(), "float32", 130, 100)  # as from another process
    assert torch.equal(kernels.linear(x, again), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_packing_loses_nothing(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight = torch.randn(outputs, inputs).to(dtype)
    assert torch.equal(reference.dequantize(kernels.pack_weight(weight)), weight)


def test_without_matrix_instructions(use_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without AMX take another way through bfloat16: with AVX-512 and AVX2 the same to the bit."""
    if cpu.instruction_sets() != ["avx512", "avx2"]:
        pytest.skip("this processor has not both")
    monkeypatch.setattr("llm_runtime.kernels.cpu.compile.EXTENSIONS", ())
    for inputs, outputs in SHAPES:
        weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(40, inputs).bfloat16()
        packed = kernels.pack_weight(weight)
        results = []
        for name in ("avx512", "avx2"):
            use_backend(name)
            results += [kernels.linear(x, weight, deterministic=True), kernels.linear(x, packed)]
            results += [torch.cat([kernels.linear(row[None], packed) for row in x])]
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(results[0].double(), exact, atol=1e-4 * inputs**0.5, rtol=1e-2)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [2, 30, 34, 98, 576])
def test_products_of_pairs(
    inputs: int, dtype: torch.dtype, use_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 weights, packed and not, where there are products of pairs and no matrix registers: each row by
    itself, wherever in memory it lies. Rows of float32 keep their bits."""
    extensions = EXTENSIONS[:2]
    if not processor_flags().issuperset(extensions[-1]) or "avx512" not in cpu.instruction_sets():
        pytest.skip("this processor does not multiply pairs of bfloat16")
    monkeypatch.setattr("llm_runtime.kernels.cpu.compile.EXTENSIONS", extensions)
    use_backend("avx512")
    native = cpu.library()
    assert native is not None
    for outputs in (1, 33, 64, 200):
        weight = torch.randn(outputs * inputs + 1).bfloat16()[1:].view(outputs, inputs)
        x, bias = torch.randn(100, inputs + 1).to(dtype)[:, 1:], torch.randn(outputs).to(dtype)
        exact = x.double() @ weight.double().T + bias.double()
        torch.set_num_threads(1)
        wide = functions.linear(native, x, weight, bias, True)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide.double(), exact, atol=5e-6 * inputs**0.5, rtol=1e-5)
        assert torch.equal(wide, functions.linear(native, x, weight, None, True) + bias.float())
        for given in (weight, kernels.pack_weight(weight)):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for rows in (0, *range(1, 14), 100):
                    start = random.randrange(100 - rows + 1)
                    part = functions.linear(native, x[start : start + rows], given, bias)
                    assert torch.equal(part, wide[start : start + rows].to(dtype)), f"{rows} rows, {threads} threads"


def test_beside_onednn() -> None:
    """torch's own matrix products use the same tile registers."""
    weight, x = torch.randn(256, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    packed = kernels.pack_weight(weight)
    ours, theirs = kernels.linear(x, packed), F.linear(x, weight)
    for _ in range(20):
        assert torch.equal(kernels.linear(x, packed), ours)
        assert torch.equal(F.linear(x, weight), theirs)


@pytest.mark.usefixtures("backend")
def test_rejects_what_does_not_fit() -> None:
    weight = torch.randn(8, 4)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.linear(torch.randn(2, 5), kernels.pack_weight(weight))
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(torch.randn(2, 4), weight, torch.randn(7), deterministic=True)
