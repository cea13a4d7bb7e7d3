"""Copies of int4 weights in bytes: what is in them, and layers that are computed by them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from kernels import cpu, packing, reference
from kernels.cpu import functions, paths

SHAPES = [(32, 1), (96, 33), (64, 64), (576, 200), (1536, 70)]
CLOSE = 1.5e-2
"""How far off results may be, relative to all of a layer's: activations of a byte, 96 to a scale."""


def copied(outputs: int, inputs: int) -> kernels.PackedWeight:
    return kernels.copy_weight(kernels.pack_weight(torch.randn(outputs, inputs), kind="int4"))


def values(weight: kernels.PackedWeight) -> torch.Tensor:
    """The weight that its copy holds."""
    assert weight.copy is not None
    size = 16 * packing.COPY_SPAN
    spans = weight.copy.view(-1, -(-weight.in_features // packing.COPY_SPAN), size + 64)  # [sixteens, spans, bytes]
    quants = spans[..., :size].unflatten(-1, (-1, 16, 4)).permute(0, 3, 1, 2, 4).flatten(-2)
    scales = spans[..., size:].contiguous().view(torch.float32).transpose(1, 2)
    whole = ((quants.double() - 128) * scales[..., None].double()).flatten(0, 1).flatten(1)
    return whole[: weight.out_features, : weight.in_features]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_holds_the_weight(inputs: int, outputs: int) -> None:
    weight = copied(outputs, inputs)
    assert weight.copy is not None
    wanted = reference.dequantize(weight).double()
    spans = torch.nn.functional.pad(wanted.abs(), (0, -inputs % packing.COPY_SPAN)).unflatten(
        -1, (-1, packing.COPY_SPAN)
    )
    off = torch.nn.functional.pad((values(weight) - wanted).abs(), (0, -inputs % packing.COPY_SPAN))
    # A scale is no more than a 127th of what a group could hold, which is at most 15 of its steps from its least value.
    assert (off.unflatten(-1, (-1, packing.COPY_SPAN)).amax(-1) <= spans.amax(-1) / 127 + 1e-6).all()
    plain = torch.empty_like(weight.copy)
    packing.fill_copy(weight.panels, outputs, inputs, plain)
    apart = (plain.int() - weight.copy.int()).abs()
    assert apart.max() <= 1, "a value between two steps may be rounded either way"
    assert (apart > 0).double().mean() < 0.01


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_layer(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Close to the product, each row by itself, whatever the number of rows and threads."""
    native = cpu.library()
    assert native is not None
    weight, bias = copied(outputs, inputs), torch.randn(outputs).to(dtype)
    x = (torch.randn(70, inputs) * torch.rand(70, 1)).to(dtype)
    product = x.double() @ reference.dequantize(weight).double().T
    torch.set_num_threads(1)
    whole = functions.linear_quantized(native, x, weight, bias, functions.COPY)
    assert whole.dtype == dtype
    error = whole.double() - bias.double() - product
    assert error.norm() / product.norm() < CLOSE
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in range(1, 70):
            part = functions.linear_quantized(native, x[:rows], weight, bias, functions.COPY)
            assert torch.equal(part, whole[:rows]), f"{rows} rows, {threads} threads"
    wide = functions.linear_quantized(native, x, weight, None, functions.COPY, True)
    assert wide.dtype == torch.float32
    assert (wide.double() - product).norm() / product.norm() < CLOSE


def test_instruction_sets_agree(use_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    available = cpu.instruction_sets()
    if not available:
        pytest.skip("this processor has neither")
    for inputs, outputs in SHAPES:
        weight, x, results = copied(outputs, inputs), torch.randn(40, inputs), []

        def layer(weight: kernels.PackedWeight = weight, x: torch.Tensor = x) -> torch.Tensor:
            native = cpu.library()
            assert native is not None
            return functions.linear_quantized(native, x, weight, None, functions.COPY)

        for name in available:
            use_backend(name)
            results.append(layer())
        with monkeypatch.context() as patch:
            patch.setattr("kernels.cpu.compile.EXTENSIONS", ())
            use_backend(available[0])
            results.append(layer())
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("native")
def test_extremes() -> None:
    """The greatest sums of all, and values that are no numbers."""
    native = cpu.library()
    assert native is not None
    inputs = 1024
    plain = kernels.pack_weight(torch.ones(2, inputs) * torch.tensor([[1.0], [-1.0]]), kind="int4")
    weight = kernels.copy_weight(plain)
    x = torch.ones(20, inputs)
    x[1] *= -1
    x[2] = 0
    x[3, 7] = torch.nan
    for rows in (4, 20):
        out = functions.linear_quantized(native, x[:rows], weight, None, functions.COPY)
        torch.testing.assert_close(out[0], torch.tensor([inputs, -inputs]).float(), rtol=1e-2, atol=0)
        torch.testing.assert_close(out[1], -out[0])
        assert not out[2].any()
        assert not out[3].isfinite().any()
        assert out[4:].isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_scale_that_is_no_number_is_not_lost(group: int) -> None:
    scales = torch.full((64, 3), 0.5).half()
    scales[5, group] = torch.nan
    quants, minimums = torch.zeros(64, 96, dtype=torch.uint8), torch.ones(64, 3).half()
    held = values(kernels.copy_weight(kernels.pack_int4(quants, scales, minimums)))
    assert held[5].isnan().all()
    assert held[torch.arange(64) != 5].isfinite().all()


@pytest.mark.usefixtures("native")
def test_taken_by_measured_numbers_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(paths, "_path", lambda: path)
    paths._table.cache_clear()
    weight = copied(64, 96)
    try:
        table = kernels.tune([weight])
        (key,) = (key for key in table if key.startswith("copy 64 96 "))
        assert len(table[key]) == 1
        path.write_text(json.dumps(table | {key: [5]}))
        paths._table.cache_clear()
        assert [paths.way(weight, rows, False) == functions.COPY for rows in (4, 5, 200)] == [False, True, True]
        assert paths.way(weight, 200, True) != functions.COPY, "its bits are others"
        assert paths.way(replace(weight, copy=None), 200, False) != functions.COPY
        assert paths.way(weight.rows(0, 64), 200, False) != functions.COPY
        x = torch.randn(8, 96)
        native = cpu.library()
        assert native is not None
        assert torch.equal(
            kernels.linear(x, weight), functions.linear_quantized(native, x, weight, None, functions.COPY)
        )
        for damaged in ("[]", "[5, 6, 7]", '"many"', "[-1]"):
            path.write_text(f'{{"{key}": {damaged}}}')
            paths._table.cache_clear()
            assert paths.copy_rows(64, 96) == paths.DEFAULT_COPY_ROWS[0]
    finally:
        paths._table.cache_clear()


def test_rejects_what_does_not_fit() -> None:
    weight = kernels.pack_weight(torch.randn(8, 64), kind="int4")
    size = kernels.copy_bytes(8, 64)
    for wrong in (torch.empty(size - 1, dtype=torch.uint8), torch.empty(size, dtype=torch.int8)):
        with pytest.raises(ValueError, match=rf"a contiguous uint8 tensor \[{size}\]"):
            kernels.copy_weight(weight, wrong)
    with pytest.raises(ValueError, match="of a weight in int8"):
        kernels.copy_weight(kernels.pack_weight(torch.randn(8, 64), kind="int8"))
