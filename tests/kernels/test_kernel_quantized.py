"""int8 and int4 weights: close to the float product, and a row's result the same to the bit whatever the others are."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import cpu, reference
from llm_runtime.kernels.cpu import functions, paths

SHAPES = [(32, 1), (96, 33), (64, 64), (576, 200), (1536, 70)]
KINDS: list[kernels.WeightKind] = ["int8", "int4"]
CASES = [(kind, *shape) for kind in KINDS for shape in SHAPES] + [
    ("int8", inputs, outputs) for inputs, outputs in [(1, 3), (31, 64), (33, 65), (47, 130), (577, 32)]
]
"""Kinds, inputs and outputs: int8 has a last group of any number of inputs."""
ROWS = (*range(1, 18), 24, 33, 100)
"""Tiles of all sizes, and several."""
TWO_BYTES, BFLOAT16 = 1e-4, 3e-3
"""The most that rounding activations to that may change, relative to all of a result."""


def rounded(x: Tensor) -> Tensor:
    """x in float64 after it was rounded to two bytes, 32 features to a scale."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    # A quotient, as the kernel has it: `32512 / most` would be the product with a reciprocal.
    steps = (groups * torch.where(most > 0, torch.full_like(most, 127 * 256) / most, 0)).round()
    return (steps.double() * (most / (127 * 256)).double()).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_against_float64(inputs: int, outputs: int, dtype: torch.dtype, kind: kernels.WeightKind) -> None:
    packed = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
    weight, bias = reference.dequantize(packed).double(), torch.randn(outputs).to(dtype)
    for rows in (0, 1, 3, 16, 37, 70):
        x = torch.randn(rows, inputs).to(dtype) * torch.rand(rows, 1).to(dtype)
        for added in (None, bias):
            extra = 0 if added is None else added.double()
            for deterministic in (False, True):
                out = kernels.linear(x, packed, added, deterministic=deterministic)
                assert out.dtype == dtype
                noise = 0.02 * x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=-1) / inputs**0.5 + 1e-6
                found = (out.double() - extra - x.double() @ weight.T).abs()
                assert (found <= 6 * noise + 0.01 * out.double().abs()).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("kind", "inputs", "outputs"), CASES)
def test_is_the_product_of_rounded_activations(kind: kernels.WeightKind, inputs: int, outputs: int) -> None:
    packed = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
    weight = reference.dequantize(packed).double()
    x = torch.randn(37, inputs) * torch.rand(37, 1)
    x[5] = 0
    exact = rounded(x) @ weight.T
    for rows in (1, 2, 3, 4, 5, 37):
        out = kernels.linear(x[:rows], packed, deterministic=True).double()
        torch.testing.assert_close(out, exact[:rows], atol=2e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_same_bits_in_any_batch(inputs: int, outputs: int, kind: kernels.WeightKind) -> None:
    packed = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
    bias, x = torch.randn(outputs), torch.randn(150, inputs)
    torch.set_num_threads(1)
    whole = kernels.linear(x, packed, bias, deterministic=True)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for length in (1, 2, 3, 4, 16, 33, 100):
            start = random.randrange(150 - length)
            part = kernels.linear(x[start : start + length], packed, bias, deterministic=True)
            assert torch.equal(part, whole[start : start + length]), f"{length} rows, {count} threads"
        shuffled = torch.randperm(150)
        assert torch.equal(kernels.linear(x[shuffled], packed, bias, deterministic=True), whole[shuffled])


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "inputs", "outputs"), CASES)
def test_all_ways(kind: kernels.WeightKind, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Products of whole numbers are the same to the bit in vectors and tiles; all are close, and go row by row."""
    native = cpu.library()
    assert native is not None
    packed = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
    x, bias = torch.randn(max(ROWS), inputs + 3).to(dtype)[:, 3:], torch.randn(outputs).to(dtype)
    product = x.double() @ reference.dequantize(packed).double().T
    torch.set_num_threads(1)
    vectors = functions.linear_quantized(native, x, packed, bias, paths.VECTORS)
    for way in paths.WAYS[kind]:
        torch.set_num_threads(1)
        wide = functions.linear_quantized(native, x, packed, bias, way, True)
        assert wide.dtype == torch.float32
        exact = way in (paths.VECTORS, paths.BYTE_TILES)
        error = wide.double() - bias.double() - product
        assert error.norm() / product.norm() < (TWO_BYTES if exact else BFLOAT16)
        plain = functions.linear_quantized(native, x, packed, None, way, True)
        assert torch.equal(wide, plain + bias.float())
        whole = functions.linear_quantized(native, x, packed, bias, way)
        assert torch.equal(whole, wide.to(dtype))
        if exact:
            assert torch.equal(whole, vectors)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in ROWS:
                start = random.randrange(len(x) - rows + 1)
                part = functions.linear_quantized(native, x[start : start + rows], packed, bias, way)
                assert torch.equal(part, whole[start : start + rows]), f"{rows} rows, {threads} threads, way {way}"


@pytest.mark.parametrize(("kind", "inputs", "outputs"), CASES)
def test_instruction_sets_agree(
    kind: kernels.WeightKind,
    inputs: int,
    outputs: int,
    use_backend: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With AVX2 and AVX-512, without and with products of half words: the same to the bit."""
    available = cpu.instruction_sets()
    if not available:
        pytest.skip("this processor has neither")
    packed, x = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind), torch.randn(40, inputs)

    def layers() -> Tensor:
        native = cpu.library()
        assert native is not None
        return torch.cat(
            [functions.linear_quantized(native, x[:rows], packed, None, paths.VECTORS) for rows in (1, 40)]
        )

    results = []
    for name in available:
        use_backend(name)
        results.append(layers())
    with monkeypatch.context() as patch:
        patch.setattr("llm_runtime.kernels.cpu.compile.EXTENSIONS", ())
        use_backend(available[0])
        results.append(layers())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in KINDS for way in paths.WAYS[kind]])
def test_extremes(kind: kernels.WeightKind, way: int) -> None:
    """The greatest sums of all, and values that are no numbers."""
    native = cpu.library()
    assert native is not None
    inputs = 65536 if kind == "int8" else 1024
    packed = kernels.pack_weight(torch.ones(2, inputs) * torch.tensor([[1.0], [-1.0]]), kind=kind)
    x = torch.ones(20, inputs)
    x[1] *= -1
    x[2] *= 2**-100
    x[3] = 0
    x[4, 7] = torch.nan
    x[5, -1] = torch.inf
    x[6, 20:] = -torch.inf
    for rows in (1, 7, 20):
        out = functions.linear_quantized(native, x[:rows], packed, None, way)
        torch.testing.assert_close(out[0], torch.tensor([inputs, -inputs]).float(), rtol=1e-2, atol=0)
    torch.testing.assert_close(out[1], -out[0])
    torch.testing.assert_close(out[2], out[0] * 2**-100, rtol=1e-5, atol=0)
    assert not out[3].any()
    assert not out[4:7].isfinite().any()
    assert torch.equal(out[7:], out[:1].expand(13, 2))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(kind: kernels.WeightKind, dtype: torch.dtype) -> None:
    packed = kernels.pack_weight(torch.randn(130, 96), kind=kind)
    ids = torch.tensor([0, 63, 64, 129, 5, 5])
    expected = reference.dequantize(packed)[ids].to(dtype)
    torch.testing.assert_close(kernels.embedding(ids, packed, dtype), expected, rtol=1e-6, atol=1e-7)
    assert kernels.embedding(ids[:0], packed, dtype).shape == (0, 96)
    for wrong in (-1, 130):
        with pytest.raises(IndexError):
            kernels.embedding(torch.tensor([wrong]), packed, dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_rejects_what_does_not_fit(kind: kernels.WeightKind) -> None:
    packed = kernels.pack_weight(torch.randn(8, 64), kind=kind)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.linear(torch.randn(2, 32), packed)
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(torch.randn(2, 64), packed, torch.randn(7))


@pytest.mark.usefixtures("native")
def test_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(paths, "_path", lambda: path)
    monkeypatch.setattr(paths, "processor_flags", lambda: set(paths.EXTENSIONS[-1]))
    monkeypatch.setattr(paths, "PART_OUTPUTS", 64)
    paths._table.cache_clear()
    paths._has_tiles.cache_clear()
    weights = [kernels.pack_weight(torch.randn(outputs, 64), kind=kind) for kind in KINDS for outputs in (64, 130)]
    int8, _, int4, _ = weights
    try:
        table = kernels.tune([*weights, kernels.pack_weight(torch.randn(4, 4))])
        assert json.loads(path.read_text()) == table
        assert {key.rsplit(" ", 1)[0] for key in table} == {
            f"{kind} {outputs} 64" for kind in KINDS for outputs in (64, 130)
        }
        monkeypatch.setattr(paths, "_measure", lambda *_: pytest.fail("measured again"))
        assert kernels.tune(weights) == table
        path.write_text(json.dumps({key: [5, 6, 7] for key in table}))
        paths._table.cache_clear()
        assert [paths.way(int8, rows, False) for rows in (4, 5, 6, 7)] == [0, 0, 1, 2]
        assert [paths.way(int4, rows, False) for rows in (4, 5, 6, 7)] == [3, 3, 1, 2]
        assert [paths.way(int4, rows, True) for rows in (4, 5, 6, 7)] == [0, 1, 1, 1]
        key = min(table)
        for damaged in ("", "[1]", f'{{"{key}": "many"}}', f'{{"{key}": [1]}}', f'{{"{key}": [1, 2, -1]}}'):
            path.write_text(damaged)
            paths._table.cache_clear()
            rows = paths.DEFAULT_ROWS[0]
            assert [paths.way(int4, rows - 1, True), paths.way(int4, rows, True)] == [0, 1]
    finally:
        paths._table.cache_clear()
        paths._has_tiles.cache_clear()


@pytest.mark.usefixtures("native")
def test_without_matrix_registers_all_rows_go_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(paths, "_path", lambda: path)
    monkeypatch.setattr(paths, "processor_flags", set)
    paths._table.cache_clear()
    paths._has_tiles.cache_clear()
    int8, int4 = (kernels.pack_weight(torch.randn(64, 64), kind=kind) for kind in KINDS)
    try:
        assert kernels.tune([int8, int4]) == {}
        assert not path.exists()
        for rows in (1, 3, 100, 10**6):
            assert [paths.way(int4, rows, deterministic) for deterministic in (False, True)] == [3, 0]
            assert [paths.way(int8, rows, deterministic) for deterministic in (False, True)] == [0, 0]
    finally:
        paths._table.cache_clear()
        paths._has_tiles.cache_clear()
