"""The operations on a CUDA device against the same ones in plain torch on the CPU."""

import random
from typing import Any

import pytest
import torch

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta, SamplingTensors, reference, reference_moe_mla
from llm_runtime.kernels.triton import library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def on_device(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, rounding: float) -> None:
    actual, wanted = actual.cpu().float(), wanted.float()
    assert not actual.isnan().any()
    assert ((actual - wanted).norm() / wanted.norm()).item() < rounding
    torch.testing.assert_close(actual, wanted, atol=8 * rounding, rtol=8 * rounding)


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "activations", "cached", "window"),
    [
        (64, 8, 8, F32, F32, None),
        (96, 9, 3, F32, BF16, 70),
        (64, 9, 3, BF16, BF16, None),
        (128, 32, 8, BF16, BF16, None),
        (128, 40, 8, BF16, BF16, 70),
        (128, 32, 8, BF16, INT8, None),
        (256, 16, 1, BF16, BF16, None),
    ],
)
def test_attention(
    dim: int, heads: int, kv_heads: int, activations: torch.dtype, cached: torch.dtype, window: int | None
) -> None:
    """Decode rows, chunks and empty rows of up to 600 keys, in one step; then decode rows alone."""
    page_size = random.choice([1, 16, 24, 64])
    longest, rows = 640, 6
    pages = -(-longest // page_size)
    table = torch.randperm(rows * pages).int().view(rows, pages)
    cos, sin = kernels.rotary_table(random.choice([dim, dim // 2]), longest, 1e4)
    shape = rows * pages, 2, 2, page_size, kv_heads, dim
    cache = (10 * torch.randn(shape)).to(INT8) if cached == INT8 else torch.randn(shape).to(cached)
    scales = torch.rand(shape[:-1]) / 20 if cached == INT8 else None
    for starts, lengths in (
        ([600, 0, 5, 64, 127, 300], [1, 130, 0, 33, 2, 200]),
        ([599, 0, 5, 64, 127, 300], [1, 1, 1, 1, 1, 1]),
        ([128], [77]),
    ):
        meta = AttentionMeta.build(starts, lengths, table, list(range(len(starts)))[::-1])
        fused = torch.randn(sum(lengths), (heads + 2 * kv_heads) * dim).to(activations)
        q, k, v = fused.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
        of_device = on_device(cache)[:, 1], None if scales is None else on_device(scales)[:, 1]
        before = [None if each is None else each.clone() for each in of_device]
        device_meta = AttentionMeta.build(starts, lengths, table.cuda(), list(range(len(starts)))[::-1])
        here = cache.clone()[:, 1], None if scales is None else scales.clone()[:, 1]
        wanted = reference.attention(q, k, v, here[0], meta, cos, sin, dim**-0.5, window, False, here[1])
        for deterministic in (False, True):
            for each, old in zip(of_device, before, strict=True):
                if each is not None and old is not None:
                    each.copy_(old)
            q2, k2, v2 = fused.cuda().unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
            out = kernels.attention(
                q2, k2, v2, of_device[0], device_meta, cos.cuda(), sin.cuda(), dim**-0.5, window, deterministic,
                of_device[1],
            )  # fmt: skip
            assert_close(out, wanted, 2e-6 if cached == F32 else 3e-5 if activations == F32 else 8e-3)
            written = of_device[0].cpu().float(), here[0].float()
            torch.testing.assert_close(*written, atol=1 if cached == INT8 else 2e-2, rtol=1e-2)


def test_attention_does_not_depend_on_the_step_where_that_is_asked_for() -> None:
    table = torch.randperm(64).int().view(4, 16).cuda()
    cos, sin = (each.cuda() for each in kernels.rotary_table(128, 256, 1e4))
    cache = torch.randn(64, 2, 16, 8, 128, dtype=BF16, device="cuda")
    fused = torch.randn(120, 48 * 128, dtype=BF16, device="cuda")
    q, k, v = fused.unflatten(1, (-1, 128)).split([32, 8, 8], 1)
    meta = AttentionMeta.build([40, 0, 200], [100, 19, 1], table)
    out = kernels.attention(q, k, v, cache, meta, cos, sin, 0.1, deterministic=True)
    for at, start, slot in ((0, 40, 0), (63, 103, 0), (118, 18, 1), (119, 200, 2)):
        alone = AttentionMeta.build([start], [1], table, [slot])
        part = slice(at, at + 1)
        again = kernels.attention(q[part], k[part], v[part], cache, alone, cos, sin, 0.1, deterministic=True)
        assert torch.equal(again, out[part])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [64, 576, 4096, 5120])
def test_norms_and_gates(dtype: torch.dtype, width: int) -> None:
    rounding = 2e-6 if dtype == F32 else 5e-3
    x, stream, weight = torch.randn(37, width).to(dtype), torch.randn(37, width).to(dtype), torch.rand(width).to(dtype)
    actual = kernels.rms_norm(x.cuda(), weight.cuda(), 1e-5, stream.cuda())
    for each, wanted in zip(actual, reference.rms_norm(x, weight, 1e-5, stream), strict=True):
        assert_close(each, wanted, rounding)
    heads = torch.randn(37, 6 * 64).to(dtype).unflatten(1, (6, 64))[:, 1:4]
    actual, _ = kernels.rms_norm(heads.cuda(), weight[:64].cuda(), 1e-5)
    assert_close(actual, reference.rms_norm(heads, weight[:64], 1e-5, None)[0], rounding)
    gates = 4 * torch.randn(37, 2 * width).to(dtype)
    assert_close(kernels.silu_and_mul(gates.cuda()), reference.silu_and_mul(gates), rounding)


@pytest.mark.parametrize(("activations", "cached"), [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize(("heads", "rank", "rotated"), [(5, 40, 12), (16, 512, 64)])
def test_mla_attention(activations: torch.dtype, cached: torch.dtype, heads: int, rank: int, rotated: int) -> None:
    page_size, longest = 16, 320
    table = torch.randperm(60).int().view(3, 20)
    cos, sin = kernels.rotary_table(rotated, longest, 1e4)
    starts, lengths = [300, 0, 37], [1, 18, 2]
    tokens = sum(lengths)
    q = torch.randn(tokens, heads, rank + rotated).to(activations)
    k = torch.randn(tokens, rank + rotated).to(activations)
    parts = q[..., :rank], q[..., rank:], k[:, :rank], k[:, rank:]
    cache = torch.randn(60, page_size, rank + rotated).to(cached)
    scale = (rank + rotated) ** -0.5
    of_device = cache.cuda()
    out = kernels.mla_attention(
        *map(on_device, parts), of_device, AttentionMeta.build(starts, lengths, table.cuda()), cos.cuda(), sin.cuda(),
        scale, interleaved=True, deterministic=False,
    )  # fmt: skip
    wanted = reference_moe_mla.mla_attention(
        *parts, cache, AttentionMeta.build(starts, lengths, table), cos, sin, scale,
        interleaved=True, deterministic=False,
    )  # fmt: skip
    assert_close(out, wanted, 5e-6 if activations == cached == F32 else 8e-3)
    assert_close(of_device, cache, 1e-6 if activations == cached == F32 else 5e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens", [1, 23, 400])
def test_experts(dtype: torch.dtype, tokens: int) -> None:
    count, hidden, inner = 8, 256, 192
    gate_up, down = (
        torch.randn(count * 2 * inner, hidden).to(dtype) / 16,
        torch.randn(count * hidden, inner).to(dtype) / 14,
    )
    x, shared = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    logits = torch.randn(tokens, count)
    how: dict[str, Any] = {
        "top_k": 2, "scoring": "sigmoid", "bias": None, "groups": 2, "top_groups": 1, "normalize": True, "scaling": 2.5,
    }  # fmt: skip
    ids, weights = reference_moe_mla.route_experts(logits, **how)
    on_cuda = kernels.route_experts(logits.cuda(), **how)
    assert torch.equal(on_cuda[0].cpu(), ids)
    assert_close(on_cuda[1], weights, 1e-6)
    for deterministic in (False, True):
        out = kernels.experts(
            *map(on_device, (x, ids, weights, gate_up, down)), count, deterministic=deterministic, shared=shared.cuda()
        )
        wanted = reference_moe_mla.experts(x, ids, weights, gate_up, down, count, deterministic=False, shared=shared)
        assert_close(out, wanted, 2e-6 if dtype == F32 else 8e-3)


def test_sampling() -> None:
    """The same tokens as on the CPU, whatever the parameters."""
    rows, vocabulary = 40, 32_000
    logits = 3 * torch.randn(rows, vocabulary)
    choices = [(t, k, p, m) for t in (0.0, 0.7, 1.5) for k in (0, 40) for p in (1.0, 0.9) for m in (0.0, 0.05)]
    columns = list(zip(*(random.choice(choices) for _ in range(rows)), strict=True))
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 9999, (rows,))
    here = reference.sample(logits, SamplingTensors.build(*columns), seeds, positions)
    params = SamplingTensors.build(*columns, device="cuda")
    there = kernels.sample(logits.cuda(), params, seeds.cuda(), positions.cuda())
    assert torch.equal(there.cpu(), here)
    greedy = SamplingTensors.build([0.0] * rows, device="cuda")
    tied = torch.randn(rows, vocabulary).to(BF16).float()
    drawn = kernels.sample(tied.cuda(), greedy, seeds.cuda(), positions.cuda()).cpu()
    assert drawn.tolist() == [row.eq(row.max()).nonzero()[0].item() for row in tied]
    for one, other in zip(
        kernels.logprobs(logits.cuda(), here.cuda(), 5), reference.logprobs(logits, here, 5), strict=True
    ):
        torch.testing.assert_close(one.cpu(), other, atol=1e-5, rtol=1e-5)


def test_wide_linear() -> None:
    x, weight = torch.randn(9, 512).to(BF16), torch.randn(777, 512).to(BF16)
    out = kernels.linear(x.cuda(), weight.cuda(), wide=True)
    assert out.dtype == F32
    assert_close(out, x.float() @ weight.float().T, 1e-5)


def test_triton_is_there() -> None:
    assert library() is not None
