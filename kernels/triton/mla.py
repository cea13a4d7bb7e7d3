"""Latent attention in its absorbed form: the write into the paged cache, attention split over the keys, and a merge.

Every token is attended for by programs of its own, and the keys of one at position p are cut into SPLITS parts that
follow from p alone: so a token's result does not depend on what else is in the step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_runtime.kernels.triton.products import narrow
from llm_runtime.kernels.types import AttentionMeta

SPLITS = 8
BLOCK_HEADS = 16
TOKENS_A_LAUNCH = 256
"""Tokens whose parts are held at a time."""


@triton.jit
def _write_keys(
    latent, k_rope, cache, cos, sin, slots, positions, table,
    latent_stride, k_rope_stride, page_stride, table_stride, rank, half, page_size,
    INTERLEAVED: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token's latent, and its rotated key as the first of all pairs and then the second."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    page = tl.load(table + tl.load(slots + token) * table_stride + position // page_size).to(tl.int64)
    line = cache + page * page_stride + (position % page_size) * (rank + 2 * half)
    at = tl.arange(0, BLOCK_RANK)
    tl.store(line + at, tl.load(latent + token * latent_stride + at, mask=at < rank), mask=at < rank)
    at = tl.arange(0, BLOCK_HALF)
    inside = at < half
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart = 1 if INTERLEAVED else half
    first = tl.load(k_rope + token * k_rope_stride + at * step, mask=inside).to(tl.float32)
    second = tl.load(k_rope + token * k_rope_stride + at * step + apart, mask=inside).to(tl.float32)
    c = tl.load(cos + position * half + at, mask=inside)
    s = tl.load(sin + position * half + at, mask=inside)
    tl.store(line + rank + at, first * c - second * s, mask=inside)
    tl.store(line + rank + half + at, second * c + first * s, mask=inside)


@triton.jit
def _attend_part(
    q_latent, q_rope, cache, cos, sin, slots, positions, table, parts, part_sums,
    q_latent_stride, q_latent_head, q_rope_stride, q_rope_head, page_stride, table_stride,
    first_token, heads, rank, half, page_size, scale,
    INTERLEAVED: tl.constexpr, NARROW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of a token and one part of its keys: parts [T, Hq, SPLITS, R], the part's own attention, and
    part_sums [T, Hq, SPLITS], the logarithm of the sum of exponentials behind it."""
    index = tl.program_id(0).to(tl.int64)
    token = first_token + index
    split = tl.program_id(2)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    precision: tl.constexpr = "tf32" if NARROW else "ieee"
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_heads = head < heads
    at = tl.arange(0, BLOCK_RANK)
    in_rank = at < rank
    pair = tl.arange(0, BLOCK_HALF)
    in_half = pair < half

    position = tl.load(positions + token)
    line = q_latent + token * q_latent_stride + head[:, None] * q_latent_head + at[None, :]
    q = tl.load(line, mask=in_heads[:, None] & in_rank[None, :], other=0).to(dtype)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart = 1 if INTERLEAVED else half
    line = q_rope + token * q_rope_stride + head[:, None] * q_rope_head + pair[None, :] * step
    inside = in_heads[:, None] & in_half[None, :]
    first = tl.load(line, mask=inside, other=0).to(tl.float32)
    second = tl.load(line + apart, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + position * half + pair, mask=in_half, other=0)[None, :]
    s = tl.load(sin + position * half + pair, mask=in_half, other=0)[None, :]
    q_first = (first * c - second * s).to(dtype)
    q_second = (second * c + first * s).to(dtype)

    count = position + 1
    each = tl.cdiv(tl.cdiv(count, BLOCK_KEYS), SPLITS) * BLOCK_KEYS
    start = split * each
    end = tl.minimum(start + each, count)
    line_of_table = table + tl.load(slots + token) * table_stride
    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_RANK], tl.float32)
    for block in range(start, end, BLOCK_KEYS):
        key = block + tl.arange(0, BLOCK_KEYS)
        seen = key < end
        page = tl.load(line_of_table + key // page_size, mask=seen, other=0).to(tl.int64)
        keys = cache + (page * page_stride + (key % page_size) * (rank + 2 * half))[:, None]
        k = tl.load(keys + at[None, :], mask=seen[:, None] & in_rank[None, :], other=0).to(dtype)
        of_pairs = seen[:, None] & in_half[None, :]
        k_first = tl.load(keys + rank + pair[None, :], mask=of_pairs, other=0).to(dtype)
        k_second = tl.load(keys + rank + half + pair[None, :], mask=of_pairs, other=0).to(dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        scores += tl.dot(q_first, tl.trans(k_first), input_precision=precision)
        scores += tl.dot(q_second, tl.trans(k_second), input_precision=precision)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        old = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
        total = total * old + tl.sum(weights, axis=1)
        mixed = mixed * old[:, None] + tl.dot(weights.to(dtype), k, input_precision=precision)
        peak = new_peak
    if start < count:
        to = (index * heads + head) * SPLITS + split
        tl.store(part_sums + to, peak + tl.log(total), mask=in_heads)
        of_rank = in_heads[:, None] & in_rank[None, :]
        tl.store(parts + to[:, None] * rank + at[None, :], mixed / total[:, None], mask=of_rank)


@triton.jit
def _merge_parts(
    parts, part_sums, out, positions, first_token, heads, rank,
    SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """The parts of a head, in order."""
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(positions + first_token + index) + 1
    each = tl.cdiv(tl.cdiv(count, BLOCK_KEYS), SPLITS) * BLOCK_KEYS
    at = tl.arange(0, BLOCK_RANK)
    inside = at < rank
    line = (index * heads + head) * SPLITS
    peak = tl.load(part_sums + line)
    total = peak * 0 + 1
    mixed = tl.load(parts + line * rank + at, mask=inside, other=0)
    for split in range(1, tl.cdiv(count, each)):
        new = tl.load(part_sums + line + split)
        new_peak = tl.maximum(peak, new)
        old = tl.exp(peak - new_peak)
        factor = tl.exp(new - new_peak)
        mixed = mixed * old + tl.load(parts + (line + split) * rank + at, mask=inside, other=0) * factor
        total = total * old + factor
        peak = new_peak
    tl.store(out + ((first_token + index) * heads + head) * rank + at, mixed / total, mask=inside)


def mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    interleaved: bool,
) -> Tensor:
    """See `kernels.ops_moe_mla.mla_attention`."""
    tokens, heads, rank = q_latent.shape
    out = torch.empty(tokens, heads, rank, dtype=latent.dtype, device=latent.device)
    if tokens == 0:
        return out
    q_latent, q_rope, latent, k_rope = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, latent, k_rope)
    )
    half, page_size = k_rope.shape[1] // 2, cache.shape[1]
    slots, positions = meta.row_slots.long()[meta.row_of_token], meta.positions
    blocks: dict[str, Any] = {"BLOCK_RANK": max(16, triton.next_power_of_2(rank))}
    halves: dict[str, Any] = {"BLOCK_HALF": max(16, triton.next_power_of_2(half)), "INTERLEAVED": interleaved}
    of_step = (cos, sin, slots, positions, meta.page_table)
    page_stride, table_stride = cache.stride(0), meta.page_table.stride(0)
    _write_keys[(tokens,)](
        latent, k_rope, cache, *of_step, latent.stride(0), k_rope.stride(0), page_stride, table_stride,
        rank, half, page_size, **blocks, **halves,
    )  # fmt: skip
    products_are_narrow = narrow(q_latent, cache)
    # A block of keys, and the next that is being fetched, must fit into a processor's shared memory.
    splits = {"SPLITS": SPLITS, "BLOCK_KEYS": 32 if products_are_narrow else 16}
    most = min(tokens, TOKENS_A_LAUNCH)
    parts = torch.empty(most, heads, SPLITS, rank, dtype=torch.float32, device=latent.device)
    part_sums = torch.empty(most, heads, SPLITS, dtype=torch.float32, device=latent.device)
    for first in range(0, tokens, most):
        count = min(most, tokens - first)
        _attend_part[(count, triton.cdiv(heads, BLOCK_HEADS), SPLITS)](
            q_latent, q_rope, cache, *of_step, parts, part_sums,
            *q_latent.stride()[:2], *q_rope.stride()[:2], page_stride, table_stride,
            first, heads, rank, half, page_size, scale,
            NARROW=products_are_narrow, BLOCK_HEADS=BLOCK_HEADS, num_stages=2, **splits, **blocks, **halves,
        )  # fmt: skip
        _merge_parts[(count, heads)](parts, part_sums, out, positions, first, heads, rank, **splits, **blocks)
    return out
