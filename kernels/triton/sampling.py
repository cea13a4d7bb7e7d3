"""Drawing tokens: sorted by torch, and then all of a row in one program.

The numbers are those of `kernels.reference`, to the bit: sums of integers, made by single float32 operations, none of
which may be joined with another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_runtime.kernels.reference import LOWEST
from llm_runtime.kernels.types import SamplingTensors

BLOCK = 2048


@triton.jit
def _weights(x):
    """exp(x) for x <= 0 as integers of 2**40ths: see `kernels.reference`."""
    x = tl.maximum(x, -60.0)
    power = x * 1.44269504
    power = power + 12582912.0  # 1.5 * 2**23: what is behind the point falls off, halves to even numbers
    power = power - 12582912.0
    r = x - power * 0.693359375
    r = r - power * -2.12194440e-4
    y = r * 1.9875691500e-4
    y = (y + 1.3981999507e-3) * r
    y = (y + 8.3334519073e-3) * r
    y = (y + 4.1665795894e-2) * r
    y = (y + 1.6666665459e-1) * r
    y = (y + 5.0000001201e-1) * (r * r)
    y = (y + r) + 1.0
    factor = ((power.to(tl.int64) + 40 + 1023) << 52).to(tl.float64, bitcast=True)
    return (y.to(tl.float64) * factor).to(tl.int64)


@triton.jit
def _multiply32(a: tl.constexpr, b):
    """High and low halves of a product of 32-bit numbers held in int64."""
    high = ((a >> 16) * b + (((a & 0xFFFF) * b) >> 16)) >> 16
    low = (((a & 0xFFFF) * b) + ((((a >> 16) * b) & 0xFFFF) << 16)) & 0xFFFFFFFF
    return high, low


@triton.jit
def _uniform(seed, position):
    """Philox4x32-10: see `kernels.ops.counter_uniform`."""
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    c0, c1 = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 << 21) | (c1 >> 11)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _block_of(x, start, vocabulary, top_k, BLOCK: tl.constexpr):
    """A block of a row: positions, numbers, and their weights among the first `top_k`."""
    at = start + tl.arange(0, BLOCK)
    inside = at < vocabulary
    value = tl.load(x + at, mask=inside, other=-60.0)
    weight = tl.where(inside & ((at < top_k) | (top_k <= 0)), _weights(value), 0)
    return at, value, weight


@triton.jit
def _draw(
    x, tokens, greedy, top_ks, top_ps, log_min_ps, seeds, positions, drawn, vocabulary, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's token. x [V]: descending, the first 0; tokens [V]: theirs. Behind a block without weight there is
    none."""
    row = tl.program_id(0).to(tl.int64)
    x += row * vocabulary
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    log_min_p = tl.load(log_min_ps + row)
    total = tl.zeros([], tl.int64)
    start = 0
    more = True
    while more:
        _, _, weight = _block_of(x, start, vocabulary, top_k, BLOCK)
        added = tl.sum(weight)
        total += added
        start += BLOCK
        more = (start < vocabulary) & (added > 0)
    bound = tl.where(top_p >= 1, float("inf"), top_p.to(tl.float64) * total.to(tl.float64))

    before = tl.zeros([], tl.int64)
    kept = tl.zeros([], tl.int64)
    start = 0
    more = True
    while more:
        _, value, weight = _block_of(x, start, vocabulary, top_k, BLOCK)
        sums = before + tl.cumsum(weight)
        keeps = ((sums - weight).to(tl.float64) < bound) & (value >= log_min_p)
        added = tl.sum(tl.where(keeps, weight, 0))
        kept += added
        before += tl.sum(weight)
        start += BLOCK
        more = (start < vocabulary) & (added > 0)

    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    target_of = _uniform(seed, position) * kept.to(tl.float64)
    target = tl.minimum(target_of.to(tl.int64), kept - 1)

    chosen = tl.zeros([], tl.int64)
    if tl.load(greedy + row) == 0:
        before = tl.zeros([], tl.int64)
        reached = tl.zeros([], tl.int64)
        start = 0
        more = True
        while more:
            at, value, weight = _block_of(x, start, vocabulary, top_k, BLOCK)
            sums = before + tl.cumsum(weight)
            keeps = ((sums - weight).to(tl.float64) < bound) & (value >= log_min_p)
            weight_kept = tl.where(keeps, weight, 0)
            sums_kept = reached + tl.cumsum(weight_kept)
            chosen += tl.sum(((sums_kept <= target) & (at < vocabulary)).to(tl.int64))
            before += tl.sum(weight)
            reached += tl.sum(weight_kept)
            start += BLOCK
            more = (start < vocabulary) & (reached <= target)
    tl.store(drawn + row, tl.load(tokens + row * vocabulary + chosen).to(tl.int32))


def sample(logits: Tensor, params: SamplingTensors, seeds: Tensor, positions: Tensor) -> Tensor:
    """See `kernels.ops.sample`; rows of which some are not greedy."""
    rows, vocabulary = logits.shape
    ordered, tokens = torch.where(logits.isnan(), float("-inf"), logits).sort(dim=-1, descending=True, stable=True)
    greedy = params.temperature == 0
    x = ordered / torch.where(greedy, 1.0, params.temperature)[:, None]
    x = x.clamp(LOWEST, -LOWEST)
    greedy |= x[:, 0] == LOWEST  # nothing is possible
    x -= x[:, :1].clone()
    drawn = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        _draw[(rows,)](
            x, tokens, greedy, params.top_k, params.top_p, params.log_min_p, seeds, positions, drawn, vocabulary,
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return drawn
