"""The Triton kernels against plain torch on the CPU; `test_kernel_triton.py` runs this under TRITON_INTERPRET=1."""

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta
from llm_runtime.kernels import reference as plain
from llm_runtime.kernels import reference_moe_mla as reference
from llm_runtime.kernels.triton import library

BFLOAT16_ERROR = 2e-2


@pytest.fixture(autouse=True)
def products_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplies tiles row by row. The interpreter leaves `tl.dot` to NumPy's BLAS, which on processors without AVX-512
    rounds a row by its place in the tile; the matrix units of a GPU do not."""
    whole = InterpreterBuilder.create_dot

    def by_rows(builder: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
        rows = [np.s_[..., row : row + 1, :] for row in range(a.data.shape[-2])]
        done = [
            whole(builder, TensorHandle(a.data[row], a.dtype), b, TensorHandle(sums.data[row], sums.dtype), *options)
            for row in rows
        ]
        return TensorHandle(np.concatenate([each.data for each in done], axis=-2), done[0].dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", by_rows)


@pytest.mark.parametrize(
    ("activations", "cached", "interleaved"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
    ],
)
def test_mla_attention(activations: torch.dtype, cached: torch.dtype, interleaved: bool) -> None:
    """Rows of one key and of many, over pages in any order; and a row alone has the same bits."""
    heads, rank, rotated, page_size, longest = 5, 40, 12, 4, 150
    triton, pages = library(), -(-longest // page_size)
    assert triton is not None
    table = torch.randperm(3 * pages).int().view(3, pages)
    cos, sin = kernels.rotary_table(rotated, longest, 1e4)
    starts, lengths = [149, 0, 37], [1, 2, 1]
    q = torch.randn(4, heads, 3 + rank + rotated).to(activations)[..., 3:]
    k = torch.randn(4, rank + rotated).to(activations)
    parts = q[..., :rank], q[..., rank:], k[:, :rank], k[:, rank:]
    cache = torch.randn(3 * pages, 2, page_size, rank + rotated).to(cached)[:, 1]
    before = cache.clone()
    meta = AttentionMeta.build(starts, lengths, table)
    out = triton.mla_attention(*parts, cache, meta, cos, sin, 0.2, interleaved=interleaved)
    expected_cache = before.clone()
    expected = reference.mla_attention(
        *parts, expected_cache, meta, cos, sin, 0.2, interleaved=interleaved, deterministic=False
    )
    assert out.dtype == activations
    rounding = 1e-5 if activations == cached == torch.float32 else BFLOAT16_ERROR
    torch.testing.assert_close(cache, expected_cache, atol=rounding, rtol=rounding)
    torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)

    alone = AttentionMeta.build([37], [1], table, [2])
    again = triton.mla_attention(*(x[3:] for x in parts), before, alone, cos, sin, 0.2, interleaved=interleaved)
    assert torch.equal(again, out[3:])


@pytest.mark.parametrize(
    ("activations", "cached", "window"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, 9),
        (torch.bfloat16, torch.int8, None),
    ],
)
def test_attention(
    activations: torch.dtype, cached: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one token and of several, and an empty one, over pages that others have poisoned; three query heads share
    a key head, and not all dimensions are rotated. Each token by itself has the same bits where they are asked for."""
    triton, page_size, kv_heads, dim = library(), 4, 2, 24
    assert triton is not None
    monkeypatch.setattr("llm_runtime.kernels.triton.attention.PROGRAMS", 40)  # which have to wait for each other here
    starts, lengths, slots = [37, 0, 5, 11, 3], [1, 6, 0, 2, 1], [4, 1, 3, 0, 2]
    table = torch.randperm(60)[:55].int().view(5, 11)
    cos, sin = kernels.rotary_table(16, 44, 1e4)
    fused = torch.randn(sum(lengths), (6 + 2 * kv_heads) * dim + 8).to(activations)
    widths = [6 * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (each.unflatten(1, (-1, dim)) for each in fused[:, 8:].split(widths, 1))
    shape = 60, 3, 2, page_size, kv_heads, dim
    floats = cached != torch.int8
    cache = torch.full(shape, torch.nan, dtype=cached)[:, 1] if floats else torch.randint(-99, 99, shape).char()[:, 1]
    scales = None if floats else torch.full(shape[:-1], torch.nan)[:, 1]
    for start, slot in zip(starts, slots, strict=True):
        pages, places = table[slot].long()[torch.arange(start) // page_size], torch.arange(start) % page_size
        vectors = torch.randn(start, 2, kv_heads, dim)
        cache[pages, :, places] = vectors.to(cached) if floats else (30 * vectors).char()
        if scales is not None:
            scales[pages, :, places] = torch.rand(start, 2, kv_heads) / 20
    meta = AttentionMeta.build(starts, lengths, table, slots)

    def run(function: Any, deterministic: bool, *step: Any) -> tuple[torch.Tensor, ...]:
        *parts, meta = step
        copies = cache.clone(), None if scales is None else scales.clone()
        out = function(*parts, copies[0], meta, cos, sin, 0.2, window, deterministic, copies[1])
        return out, *(each.nan_to_num() for each in copies if each is not None)

    step = q, k, v, meta
    expected = run(plain.attention, False, *step)
    rounding = 1e-5 if activations == torch.float32 else BFLOAT16_ERROR
    for deterministic in (False, True):
        for actual, wanted in zip(run(triton.attention, deterministic, *step), expected, strict=True):
            assert actual.dtype == wanted.dtype
            error = 1 if wanted.dtype == torch.int8 else rounding
            torch.testing.assert_close(actual, wanted, atol=error, rtol=rounding)
    together = run(triton.attention, True, *step)[0]
    alone = AttentionMeta.build([37], [1], table, [4])
    assert torch.equal(run(triton.attention, True, q[:1], k[:1], v[:1], alone)[0], together[:1])
    decoding = AttentionMeta.build([37, 3], [1, 1], table, [4, 2])
    ends = [0, sum(lengths) - 1]
    out = run(triton.attention, False, q[ends], k[ends], v[ends], decoding)[0]
    torch.testing.assert_close(out, expected[0][ends], atol=rounding, rtol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gates(dtype: torch.dtype) -> None:
    triton, rounding = library(), 1e-5 if dtype == torch.float32 else BFLOAT16_ERROR
    assert triton is not None
    x, stream, weight = torch.randn(3, 72).to(dtype), torch.randn(3, 72).to(dtype), torch.rand(72).to(dtype)
    actual = triton.rms_norm(x, weight, 1e-5, added := stream.clone())
    for each, wanted in zip(actual, plain.rms_norm(x, weight, 1e-5, stream), strict=True):
        torch.testing.assert_close(each, wanted, atol=rounding, rtol=rounding)
    assert actual[1] is added
    heads = torch.randn(3, 5 * 24 + 7).to(dtype)[:, 7:].unflatten(1, (5, 24))
    normalized, same = triton.rms_norm(heads, weight[:24], 1e-5, None)
    wanted = plain.rms_norm(heads, weight[:24], 1e-5, None)[0]
    torch.testing.assert_close(normalized, wanted, atol=rounding, rtol=rounding)
    assert same is heads
    gates = 4 * torch.randn(3, 2 * 50).to(dtype)
    torch.testing.assert_close(triton.silu_and_mul(gates), plain.silu_and_mul(gates), atol=rounding, rtol=rounding)


def test_sampling() -> None:
    """The same tokens, whatever the parameters, over more than one block of a row, with equals and with NaN."""
    triton, vocabulary = library(), 5000
    assert triton is not None
    ways = [(0.0, 0, 0.9, 0)] + [
        (t, k, p, m) for t in (0.7, 3.0) for k, p, m in ((0, 1, 0), (0, 0.9, 0.01), (3000, 0.9, 0))
    ]
    columns = list(zip(*ways, strict=True))
    logits = torch.randn(len(columns[0]), vocabulary)
    logits[3], logits[4] = logits[3].round(), torch.nan
    logits[5, 100:] = -torch.inf
    params = kernels.SamplingTensors.build(*columns)
    seeds, positions = torch.randint(-(2**62), 2**62, (2, len(logits)))
    drawn = triton.sample(logits, params, seeds, positions)
    assert torch.equal(drawn, plain.sample(logits, params, seeds, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "float32", "bfloat16"])
def test_experts(dtype: torch.dtype, kind: kernels.WeightKind | None) -> None:
    """Of rows and of panels, with experts that have no tokens, one, and more than a block holds."""
    triton, count, hidden, inner, tokens = library(), 5, 64, 96, 23
    assert triton is not None
    matrices = [torch.randn(count * 2 * inner, hidden).to(dtype) / 8, torch.randn(count * hidden, inner).to(dtype) / 8]
    gate_up, down = matrices if kind is None else (kernels.pack_weight(each, kind=kind) for each in matrices)
    x, shared = torch.randn(tokens, hidden + 2).to(dtype)[:, 2:], torch.randn(tokens, hidden).to(dtype)
    ids = torch.tensor([[0, 3]] * (tokens - 1) + [[4, 0]], dtype=torch.int32)
    weights = torch.rand(tokens, 2)
    for more in (None, shared):
        out = triton.experts(x, ids, weights, gate_up, down, count, more, deterministic=True)
        expected = reference.experts(x, ids, weights, gate_up, down, count, deterministic=False, shared=more)
        assert out.dtype == dtype
        rounding = 1e-5 if dtype == torch.float32 else BFLOAT16_ERROR
        torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)
    one = triton.experts(x[7:8], ids[7:8], weights[7:8], gate_up, down, count, shared[7:8], deterministic=True)
    assert torch.equal(one, out[7:8])


def test_experts_of_many_and_of_no_tokens() -> None:
    triton = library()
    assert triton is not None
    gate_up, down, x = torch.randn(2 * 2 * 24, 40) / 6, torch.randn(2 * 40, 24) / 5, torch.randn(150, 40)
    ids, weights = torch.randint(0, 2, (150, 1), dtype=torch.int32), torch.rand(150, 1)
    out = triton.experts(x, ids, weights, gate_up, down, 2, None, deterministic=False)
    expected = reference.experts(x, ids, weights, gate_up, down, 2, deterministic=False, shared=None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert triton.experts(x[:0], ids[:0], weights[:0], gate_up, down, 2, None, deterministic=True).shape == (0, 40)
