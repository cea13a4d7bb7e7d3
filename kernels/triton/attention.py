"""Attention over paged caches: rotation and the write into the cache, then one of two ways for each row.

A token by itself (a decode step, and every token where results shall not depend on the step) has its keys cut into
parts, which programs of their own attend to, and a merge (Flash-Decoding). Rows of several new tokens are cut into
tiles of queries, and each goes through its keys once (FlashAttention, https://arxiv.org/abs/2307.08691). Either way
the query heads that share a key head are computed together, so that a key is read once for all of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_runtime.kernels.triton.products import narrow
from llm_runtime.kernels.types import AttentionMeta

MOST_SPLITS = 32
DETERMINISTIC_SPLITS = 8
PROGRAMS = 512
"""About so many programs keep a large GPU busy."""
TOKENS_A_LAUNCH = 256
"""Tokens whose parts are held at a time."""
TILE, TILE_WARPS, TILE_STAGES = 128, 8, 2
"""Queries of a tile, of all heads of a group together."""
LOG2_E = 1.4426950408889634
SMALLEST = tl.constexpr(1e-30)  # vectors with nothing above it are cached as zeros in int8


@triton.jit
def _row_of(token, row_offsets, rows):
    """The row of a token: the last one that begins at or before it and is not empty, found by halving."""
    low = token * 0
    high = low + rows
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(row_offsets + middle) > token
        low = tl.where(behind, low, middle)
        high = tl.where(behind, middle, high)
    return low


@triton.jit(do_not_specialize=["rows"])
def _rotate_and_write(
    q, k, v, rotated, cache, cache_scales, cos, sin, row_offsets, row_starts, row_slots, table,
    q_stride, k_stride, v_stride, page_stride, half_stride, scales_stride, scales_half, table_stride,
    rows, query_heads, kv_heads, dim, half, page_size,
    ONE_EACH: tl.constexpr, QUANTIZED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Some heads of a token: queries rotated, keys rotated and cached, values cached."""
    token = tl.program_id(0).to(tl.int64)
    if ONE_EACH:
        row = token
    else:
        row = _row_of(token, row_offsets, rows)
    position = tl.load(row_starts + row) + token - tl.load(row_offsets + row)
    slot = tl.load(row_slots + row).to(tl.int64)
    page = tl.load(table + slot * table_stride + position // page_size).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    at = tl.arange(0, BLOCK_DIM)[None, :]
    is_query = head < query_heads
    is_key = (head >= query_heads) & (head < query_heads + kv_heads)
    is_value = (head >= query_heads + kv_heads) & (head < query_heads + 2 * kv_heads)
    of_key = head - query_heads
    of_value = of_key - kv_heads
    of_queries = q + token * q_stride + head[:, None] * dim
    of_keys = k + token * k_stride + of_key[:, None] * dim
    of_values = v + token * v_stride + of_value[:, None] * dim
    inside = at < dim
    queries = is_query[:, None] & inside
    keys = is_key[:, None] & inside
    values = is_value[:, None] & inside

    # Each dimension, and the one that it is turned with.
    turned = at < 2 * half
    other = tl.where(at < half, at + half, at - half)
    other = tl.where(turned, other, at)
    own = (
        tl.load(of_queries + at, mask=queries, other=0).to(tl.float32)
        + tl.load(of_keys + at, mask=keys, other=0).to(tl.float32)
        + tl.load(of_values + at, mask=values, other=0).to(tl.float32)
    )
    partner = tl.load(of_queries + other, mask=queries, other=0).to(tl.float32) + tl.load(
        of_keys + other, mask=keys, other=0
    ).to(tl.float32)
    angle = tl.where(at < half, at, at - half)
    c = tl.load(cos + position * half + angle, mask=turned, other=1)
    s = tl.load(sin + position * half + angle, mask=turned, other=0)
    s = tl.where(at < half, -s, s)
    result = tl.where(is_value[:, None], own, own * c + partner * s)
    tl.store(rotated + (token * query_heads + head[:, None]) * dim + at, result, mask=queries)

    cached = keys | values
    which = tl.where(is_value, 1, 0)
    kv_head = tl.where(is_value, of_value, of_key)
    place = position % page_size * kv_heads + kv_head
    if QUANTIZED:
        most = tl.max(tl.abs(result), axis=1)
        factor = tl.where(most >= SMALLEST, 127 / tl.maximum(most, SMALLEST), 0.0)
        # Adding and taking away 1.5 * 2**23 rounds to whole numbers, halves to even ones.
        result = result * factor[:, None] + 12582912.0
        result = tl.minimum(tl.maximum(result - 12582912.0, -128.0), 127.0)
        scale = cache_scales + page * scales_stride + which * scales_half + place
        tl.store(scale, most * (1 / 127), mask=is_key | is_value)
    to = cache + page * page_stride + (which * half_stride + place * dim)[:, None] + at
    tl.store(to, result.to(cache.dtype.element_ty), mask=cached)


@triton.jit
def _load(
    cache, cache_scales, pages, places, known, at, dim, page_stride, scales_stride, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Keys or values as they are cached, [N, D], and their scales."""
    lines = cache + (pages * page_stride + places * dim)[:, None] + at[None, :]
    vectors = tl.load(lines, mask=known[:, None] & (at < dim)[None, :], other=0)
    if QUANTIZED:
        scales = tl.load(cache_scales + pages * scales_stride + places, mask=known, other=0)
    else:
        scales = tl.full(places.shape, 1.0, tl.float32)
    return vectors, scales


@triton.jit
def _attend_block(
    q, key, known, seen, peak, total, mixed, page_line, cache, cache_scales, kv_head, at,
    page_stride, half_stride, scales_stride, scales_half, kv_heads, dim, page_size, scale,
    WHOLE: tl.constexpr, QUANTIZED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Queries [M, D] and the keys of a block: the highest score, the sum of exponentials and the mixture of values so
    far, and with these keys. `known` keys are there, and `seen` [M, N] by each query: all of them if WHOLE."""
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    precision: tl.constexpr = "tf32" if NARROW else "ieee"
    pages = tl.load(page_line + key // page_size, mask=known, other=0).to(tl.int64)
    places = key % page_size * kv_heads + kv_head
    k, k_scales = _load(cache, cache_scales, pages, places, known, at, dim, page_stride, scales_stride, QUANTIZED)
    v, v_scales = _load(
        cache + half_stride, cache_scales + scales_half, pages, places, known, at, dim, page_stride, scales_stride,
        QUANTIZED,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k.to(dtype)), input_precision=precision) * scale
    if QUANTIZED:
        scores *= k_scales[None, :]
    if not WHOLE:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    old = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * old + tl.sum(weights, axis=1)
    if QUANTIZED:
        weights *= v_scales[None, :]
    mixed = mixed * old[:, None] + tl.dot(weights.to(dtype), v.to(dtype), input_precision=precision)
    return new_peak, total, mixed


@triton.jit(do_not_specialize=["first_token", "rows", "window"])
def _attend_token(
    rotated, cache, cache_scales, row_offsets, row_starts, row_slots, table, parts, part_sums, out,
    page_stride, half_stride, scales_stride, scales_half, table_stride,
    first_token, rows, query_heads, kv_heads, dim, page_size, scale, window,
    BY_TOKEN: tl.constexpr, WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr, NARROW: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The heads of a group and one part of a token's keys. BY_TOKEN: for any token; else for rows of one.

    parts [index, Hq, SPLITS, D], the part's own attention; part_sums [index, Hq, SPLITS], the base-2 logarithm of the
    sum of exponentials behind it. With one split, `out` itself is written.
    """
    index = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if BY_TOKEN:
        token = first_token + index
        row = _row_of(token, row_offsets, rows)
        first_of_row = tl.load(row_offsets + row)
        mine = True
    else:
        row = index
        first_of_row = tl.load(row_offsets + row)
        token = first_of_row.to(tl.int64)
        mine = tl.load(row_offsets + row + 1) - first_of_row == 1
    if mine:
        position = (tl.load(row_starts + row) + token - first_of_row).to(tl.int32)
        count = position + 1
        oldest = count * 0
        if WINDOWED:
            oldest = tl.maximum(count - window, 0)
        blocks_from = oldest // BLOCK_KEYS
        each = tl.cdiv(tl.cdiv(count, BLOCK_KEYS) - blocks_from, SPLITS) * BLOCK_KEYS
        start = blocks_from * BLOCK_KEYS + split * each
        end = tl.minimum(start + each, count)
        if start < count:
            dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
            group = query_heads // kv_heads
            of_group = tl.arange(0, BLOCK_HEADS)
            in_group = of_group < group
            head = kv_head * group + of_group
            at = tl.arange(0, BLOCK_DIM)
            inside = in_group[:, None] & (at < dim)[None, :]
            line = rotated + (token * query_heads + head[:, None]) * dim + at[None, :]
            q = tl.load(line, mask=inside, other=0).to(dtype)
            page_line = table + tl.load(row_slots + row).to(tl.int64) * table_stride
            peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_HEADS], tl.float32)
            mixed = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
            for block in range(start, end, BLOCK_KEYS):
                key = block + tl.arange(0, BLOCK_KEYS)
                seen = key < end
                if WINDOWED:
                    seen = seen & (key >= oldest)
                peak, total, mixed = _attend_block(
                    q, key, seen, seen[None, :], peak, total, mixed, page_line, cache, cache_scales, kv_head, at,
                    page_stride, half_stride, scales_stride, scales_half, kv_heads, dim, page_size, scale,
                    WHOLE=False, QUANTIZED=QUANTIZED, NARROW=NARROW,
                )  # fmt: skip
            if SPLITS == 1:
                to = out + (token * query_heads + head[:, None]) * dim + at[None, :]
                tl.store(to, mixed / total[:, None], mask=inside)
            else:
                place = (index * query_heads + head) * SPLITS + split
                tl.store(part_sums + place, peak + tl.log2(total), mask=in_group)
                tl.store(parts + place[:, None] * dim + at[None, :], mixed / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["first_token", "rows", "window"])
def _merge_parts(
    parts, part_sums, out, row_offsets, row_starts, first_token, rows, query_heads, dim, window,
    BY_TOKEN: tl.constexpr, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The parts of a head, in order."""
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if BY_TOKEN:
        token = first_token + index
        row = _row_of(token, row_offsets, rows)
        first_of_row = tl.load(row_offsets + row)
        mine = True
    else:
        row = index
        first_of_row = tl.load(row_offsets + row)
        token = first_of_row.to(tl.int64)
        mine = tl.load(row_offsets + row + 1) - first_of_row == 1
    if mine:
        count = (tl.load(row_starts + row) + token - first_of_row).to(tl.int32) + 1
        blocks_from = count * 0
        if WINDOWED:
            blocks_from = tl.maximum(count - window, 0) // BLOCK_KEYS
        blocks = tl.cdiv(count, BLOCK_KEYS) - blocks_from
        filled = tl.cdiv(blocks, tl.cdiv(blocks, SPLITS))
        split = tl.arange(0, SPLITS)
        at = tl.arange(0, BLOCK_DIM)
        line = (index * query_heads + head) * SPLITS + split
        there = split < filled
        sums = tl.load(part_sums + line, mask=there, other=float("-inf"))
        weights = tl.exp2(sums - tl.max(sums, axis=0))
        weights = weights / tl.sum(weights, axis=0)
        inside = there[:, None] & (at < dim)[None, :]
        values = tl.load(parts + line[:, None] * dim + at[None, :], mask=inside, other=0)
        merged = tl.sum(values * weights[:, None], axis=0)
        tl.store(out + (token * query_heads + head) * dim + at, merged, mask=at < dim)


@triton.jit(do_not_specialize=["rows", "window"])
def _attend_tile(
    rotated, cache, cache_scales, row_offsets, row_starts, row_slots, table, out,
    page_stride, half_stride, scales_stride, scales_half, table_stride,
    rows, query_heads, kv_heads, dim, page_size, scale, window,
    WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS tokens of a row that has several, for the heads of a group, which follow each other in the tile."""
    # The last tokens of a row have the most keys: first those, so that no long tile is left over at the end.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    # A row's tiles begin where those before have ended at the latest: its number, and the whole tiles before it.
    row = index * 0
    high = row + rows
    while high - row > 1:
        middle = (row + high) // 2
        behind = tl.load(row_offsets + middle) // BLOCK_TOKENS + middle > index
        high = tl.where(behind, middle, high)
        row = tl.where(behind, row, middle)
    kv_head = tl.program_id(1)
    first_of_row = tl.load(row_offsets + row)
    length = tl.load(row_offsets + row + 1) - first_of_row
    first = (index - first_of_row // BLOCK_TOKENS - row) * BLOCK_TOKENS
    if (first < length) & (length > 1):
        dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
        group = query_heads // kv_heads
        line = tl.arange(0, BLOCK_TOKENS * BLOCK_GROUP)
        in_row = first + line // BLOCK_GROUP
        of_group = line % BLOCK_GROUP
        there = (in_row < length) & (of_group < group)
        at = tl.arange(0, BLOCK_DIM)
        inside = there[:, None] & (at < dim)[None, :]
        place = ((first_of_row + in_row).to(tl.int64) * query_heads + kv_head * group + of_group) * dim
        q = tl.load(rotated + place[:, None] + at[None, :], mask=inside, other=0).to(dtype)
        before = tl.load(row_starts + row)
        position = before + in_row
        page_line = table + tl.load(row_slots + row).to(tl.int64) * table_stride
        end = before + tl.minimum(first + BLOCK_TOKENS, length)
        start = first * 0
        if WINDOWED:
            start = tl.maximum(before + first - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        peak = tl.full([BLOCK_TOKENS * BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP], tl.float32)
        mixed = tl.zeros([BLOCK_TOKENS * BLOCK_GROUP, BLOCK_DIM], tl.float32)
        # Blocks of keys that all tokens of the tile see, and the others.
        masked_from = start if WINDOWED else (before + first + 1) // BLOCK_KEYS * BLOCK_KEYS
        for block in range(start, masked_from, BLOCK_KEYS):
            key = block + tl.arange(0, BLOCK_KEYS)
            peak, total, mixed = _attend_block(
                q, key, key < end, True, peak, total, mixed, page_line, cache, cache_scales, kv_head, at,
                page_stride, half_stride, scales_stride, scales_half, kv_heads, dim, page_size, scale,
                WHOLE=True, QUANTIZED=QUANTIZED, NARROW=NARROW,
            )  # fmt: skip
        for block in range(masked_from, end, BLOCK_KEYS):
            key = block + tl.arange(0, BLOCK_KEYS)
            seen = key[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            peak, total, mixed = _attend_block(
                q, key, key < end, seen, peak, total, mixed, page_line, cache, cache_scales, kv_head, at,
                page_stride, half_stride, scales_stride, scales_half, kv_heads, dim, page_size, scale,
                WHOLE=False, QUANTIZED=QUANTIZED, NARROW=NARROW,
            )  # fmt: skip
        tl.store(out + place[:, None] + at[None, :], mixed / total[:, None], mask=inside)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    window: int | None,
    deterministic: bool,
    cache_scales: Tensor | None,
) -> Tensor:
    """See `kernels.ops.attention`; heads and dimensions are contiguous, and so are a page's keys, and its values."""
    tokens, query_heads, dim = q.shape
    kv_heads, page_size = k.shape[1], cache.shape[2]
    out = torch.empty(tokens, query_heads, dim, dtype=v.dtype, device=v.device)
    if tokens == 0:
        return out
    rotated = torch.empty(tokens, query_heads, dim, dtype=q.dtype, device=q.device)
    scales = cos if cache_scales is None else cache_scales
    quantized = cache_scales is not None
    of_rows = meta.row_offsets, meta.row_starts, meta.row_slots, meta.page_table
    strides = *cache.stride()[:2], *scales.stride()[:2], meta.page_table.stride(0)
    block_dim = max(16, triton.next_power_of_2(dim))
    heads_each = max(1, 1024 // block_dim)
    _rotate_and_write[(tokens, triton.cdiv(query_heads + 2 * kv_heads, heads_each))](
        q, k, v, rotated, cache, scales, cos, sin, *of_rows, q.stride(0), k.stride(0), v.stride(0), *strides,
        meta.num_rows, query_heads, kv_heads, dim, cos.shape[1], page_size,
        ONE_EACH=meta.max_query == 1 and tokens == meta.num_rows,
        QUANTIZED=quantized, BLOCK_HEADS=heads_each, BLOCK_DIM=block_dim,
    )  # fmt: skip

    products_are_narrow = narrow(q) if quantized else narrow(q, cache)
    group = query_heads // kv_heads
    how: dict[str, Any] = {
        "WINDOWED": window is not None,
        "QUANTIZED": quantized,
        "NARROW": products_are_narrow,
        "BLOCK_DIM": block_dim,
    }
    sizes = (query_heads, kv_heads, dim, page_size, scale * LOG2_E, window or 0)
    if not deterministic and meta.max_query > 1:
        block_group = triton.next_power_of_2(group)
        block_tokens = max(1, (TILE if products_are_narrow else 16) // block_group)
        _attend_tile[(tokens // block_tokens + meta.num_rows, kv_heads)](
            rotated, cache, scales, *of_rows, out, *strides, meta.num_rows, *sizes,
            BLOCK_TOKENS=block_tokens, BLOCK_GROUP=block_group,
            BLOCK_KEYS=_block_keys(how), num_warps=TILE_WARPS, num_stages=TILE_STAGES, **how,
        )  # fmt: skip
        if meta.num_rows == 1:
            return out
    _attend_singly(rotated, cache, scales, of_rows, out, strides, sizes, meta, deterministic, how)
    return out


def _attend_singly(
    rotated: Tensor,
    cache: Tensor,
    scales: Tensor,
    of_rows: tuple[Tensor, ...],
    out: Tensor,
    strides: tuple[int, ...],
    sizes: tuple[Any, ...],
    meta: AttentionMeta,
    deterministic: bool,
    how: dict[str, Any],
) -> None:
    """Rows of one token, or, if `deterministic`, all tokens, whose parts then follow from their positions alone."""
    query_heads, kv_heads, dim, _, _, window = sizes
    count = meta.num_tokens if deterministic else meta.num_rows
    if deterministic:
        splits = DETERMINISTIC_SPLITS
    else:
        splits = max(1, min(MOST_SPLITS, triton.next_power_of_2(PROGRAMS // (count * kv_heads))))
    block_heads = max(16, triton.next_power_of_2(query_heads // kv_heads))
    most = min(count, TOKENS_A_LAUNCH) if deterministic else count
    parts, part_sums = out, out
    if splits > 1:
        parts = torch.empty(most, query_heads, splits, dim, dtype=torch.float32, device=out.device)
        part_sums = torch.empty(most, query_heads, splits, dtype=torch.float32, device=out.device)
    which: dict[str, Any] = {"BY_TOKEN": deterministic, "SPLITS": splits, "BLOCK_KEYS": _block_keys(how)}
    for first in range(0, count, most):
        these = min(most, count - first)
        _attend_token[(these, kv_heads, splits)](
            rotated, cache, scales, *of_rows, parts, part_sums, out, *strides, first, meta.num_rows, *sizes,
            BLOCK_HEADS=block_heads, num_warps=4, num_stages=2, **which, **how,
        )  # fmt: skip
        if splits > 1:
            _merge_parts[(these, query_heads)](
                parts, part_sums, out, *of_rows[:2], first, meta.num_rows, query_heads, dim, window,
                WINDOWED=how["WINDOWED"], BLOCK_DIM=how["BLOCK_DIM"], **which,
            )  # fmt: skip


def _block_keys(how: dict[str, Any]) -> int:
    """Keys and values of a block, and of the next that is being fetched, must fit into shared memory."""
    if not how["NARROW"]:
        return 16
    return 64 if how["BLOCK_DIM"] <= 128 else 32
