"""The Triton kernels against plain torch on the CPU; `test_kernel_triton.py` runs this under TRITON_INTERPRET=1."""

import pytest
import torch

import kernels
from kernels import AttentionMeta
from kernels import reference_moe_mla as reference
from kernels.triton import library

BFLOAT16_ERROR = 2e-2


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
