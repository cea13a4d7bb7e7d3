"""Every operation in plain torch: the meaning of the kernels, and what runs where there is none of them.

The functions here take and return exactly what those in `kernels.ops` do and are documented there; none of them asks
a device other than the CPU for a value, so that a CUDA step can be queued without waiting.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_runtime.kernels.packing import unpack, unpack_rows
from llm_runtime.kernels.types import AttentionMeta, PackedWeight, SamplingTensors, TokenMasks

KEY_BLOCK = 64  # keys in a block of deterministic attention, at fixed absolute positions
ROW_TILE = 16  # rows in each product of the deterministic linear
PRODUCT_DEPTH = 256
OUTPUT_MULTIPLE = 16

WEIGHT_BITS = 40  # sampling weights are integers, 2**40 for the most likely token
LOWEST = torch.finfo(torch.float32).min
SMALLEST = 1e-30  # vectors with nothing above it are cached as zeros in int8


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is None:
        residual = x
    else:
        residual += x
    wide = residual.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype), residual


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] dimensions of x [T, H, D] by the angles of each token, in float32."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = torch.split(x.float(), [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


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
    cache_scales: Tensor | None = None,
) -> Tensor:
    if meta.num_tokens == 0:
        return q.new_empty(q.shape)
    positions = meta.positions
    page_size = cache.shape[2]
    cos, sin = cos[positions], sin[positions]
    q = rotate(q, cos, sin)
    slots = meta.row_slots.long()
    pages = meta.page_table[slots[meta.row_of_token], positions // page_size].long()
    for half, vectors in enumerate((rotate(k, cos, sin), v)):
        at = pages, half, positions % page_size
        if cache_scales is None:
            cache[at] = vectors.to(cache.dtype)
        else:
            cache[at], cache_scales[at] = quantize(vectors)
    if deterministic:
        return _attention_one_order(q, cache, cache_scales, meta, scale, window).to(v.dtype)

    # Keys of every row, padded to the longest: [n, context, 2, Hkv, D]. Pages past a row's end are whatever the table
    # says, and masked.
    count = -(-meta.max_context // page_size)
    pages = meta.page_table[slots, :count].long().clamp(0, cache.shape[0] - 1)
    dtype = cache.dtype if q.is_cuda and cache_scales is None else torch.float32
    cached = cache[pages].to(dtype)
    if cache_scales is not None:
        cached *= cache_scales[pages][..., None]
    keys, values = cached.transpose(1, 2).flatten(2, 3).unbind(1)
    key_positions = torch.arange(keys.shape[1], device=q.device)
    # Queries of every row, padded to the longest; what is past a row's end is not read back.
    column = positions - meta.row_starts.long()[meta.row_of_token]
    queries = q.new_zeros(meta.num_rows, meta.max_query, *q.shape[1:])
    queries[meta.row_of_token, column] = q
    query_positions = meta.row_starts[:, None] + torch.arange(meta.max_query, device=q.device)
    seen = key_positions <= query_positions[..., None]
    if window is not None:
        seen &= key_positions > query_positions[..., None] - window
    # A row that is shorter than the widest window asks nothing of the keys of others: masked keys may be anything but
    # NaN times 0, so unwritten ones are cleared.
    written = key_positions < (meta.row_starts + meta.row_offsets.diff())[:, None]
    values = values.masked_fill(~written[..., None, None], 0)
    keys = keys.masked_fill(~written[..., None, None], 0)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2).to(dtype),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=seen[:, None],
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2)[meta.row_of_token, column].to(v.dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] as int8, and the float32 [...] that they are to be multiplied with."""
    x = x.float()
    most = x.abs().amax(-1)
    factor = torch.where(most >= SMALLEST, 127 / most, 0.0)
    return torch.round(x * factor[..., None]).clamp(-128, 127).to(torch.int8), most * (1 / 127)


def _attention_one_order(
    q: Tensor, cache: Tensor, cache_scales: Tensor | None, meta: AttentionMeta, scale: float, window: int | None
) -> Tensor:
    """Attention one token after the other over blocks of 64 keys, always in products of one shape: slow, and the same
    to the bit whatever else is in the step. q is rotated, float32 [T, Hq, D]."""
    page_size, kv_heads, dim = cache.shape[2:]
    out = torch.empty_like(q)
    block = torch.arange(KEY_BLOCK, device=q.device)
    for token, (row, position) in enumerate(zip(meta.row_of_token.tolist(), meta.positions.tolist(), strict=True)):
        table = meta.page_table[meta.row_slots[row]].long()
        query = q[token].view(kv_heads, -1, dim) * scale
        peak = query.new_full(query.shape[:2], float("-inf"))
        total = query.new_zeros(query.shape[:2])
        mixed = torch.zeros_like(query)
        first = 0 if window is None else max(0, position - window + 1)
        for start in range(first // KEY_BLOCK * KEY_BLOCK, position + 1, KEY_BLOCK):
            at = block + start
            seen = (at <= position) & (at >= first)
            at = at.clamp(max=position)
            cached = cache[table[at // page_size], :, at % page_size].float()
            if cache_scales is not None:
                cached *= cache_scales[table[at // page_size], :, at % page_size][..., None]
            keys, values = cached.permute(1, 2, 0, 3).contiguous()
            scores = torch.bmm(query, keys.transpose(1, 2)).masked_fill(~seen, float("-inf"))
            block_peak = scores.amax(-1)
            weights = torch.exp(scores - block_peak[..., None])
            new_peak = torch.maximum(peak, block_peak)
            old, new = torch.exp(peak - new_peak), torch.exp(block_peak - new_peak)
            total = total * old + weights.sum(-1) * new
            mixed = mixed * old[..., None] + torch.bmm(weights, values) * new[..., None]
            peak = new_peak
        out[token] = (mixed / total[..., None]).view(-1, dim)
    return out


def embedding(ids: Tensor, weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return F.embedding(ids, weight)
    if ids.is_cpu and ((ids < 0) | (ids >= weight.out_features)).any():
        raise IndexError(f"a token is not among the {weight.out_features} of the embedding")
    return unpack_rows(weight.panels, weight.kind, weight.in_features, ids).to(dtype)


def dequantize(packed: PackedWeight) -> Tensor:
    return unpack(packed.panels, packed.kind, packed.out_features, packed.in_features)


def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, deterministic: bool, wide: bool = False
) -> Tensor:
    if isinstance(weight, PackedWeight):
        weight = dequantize(weight)
        if weight.dtype != x.dtype or (wide and weight.is_cpu):
            out = linear(x.float(), weight.float(), None if bias is None else bias.float(), deterministic)
            return out if wide else out.to(x.dtype)
    if wide:
        return linear(x, weight, bias, deterministic).float()
    if not deterministic:
        return F.linear(x, weight, bias)
    # Products of one shape, so that the library below takes one path; rows of zeros fill the last. MKL shares a deep
    # float32 product among its threads, and columns that fill no vector fall to other kernels where threads divide them
    # otherwise: it gets shallow ones of whole vectors.
    if missing := -weight.shape[0] % OUTPUT_MULTIPLE:
        bias = None if bias is None else F.pad(bias, (0, missing))
        return linear(x, F.pad(weight, (0, 0, 0, missing)), bias, True)[:, :-missing].contiguous()
    depth = PRODUCT_DEPTH if x.device.type == "cpu" and x.dtype == torch.float32 else x.shape[1]
    strips = list(zip(torch.split(x, depth, dim=1), torch.split(weight, depth, dim=1), strict=True))
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], ROW_TILE):
        end = min(start + ROW_TILE, x.shape[0])
        tiles = (F.pad(rows[start:end], (0, 0, 0, start + ROW_TILE - end)) for rows, _ in strips)
        products = [
            F.linear(tile.contiguous(), columns, None if i else bias)
            for i, (tile, (_, columns)) in enumerate(zip(tiles, strips, strict=True))
        ]
        out[start:end] = sum(products[1:], products[0])[: end - start]
    return out


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    mask = 0xFFFFFFFF
    key0, key1 = seeds & mask, (seeds >> 32) & mask
    c0, c1 = positions & mask, (positions >> 32) & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return ((c0 << 21) | (c1 >> 11)).double() * 2.0**-53


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low halves of the product of 32-bit numbers held in int64, without overflowing it."""
    high = ((a >> 16) * b + (((a & 0xFFFF) * b) >> 16)) >> 16
    low = (((a & 0xFFFF) * b) + ((((a >> 16) * b) & 0xFFFF) << 16)) & 0xFFFFFFFF
    return high, low


def _weights(x: Tensor) -> Tensor:
    """exp(x) for x <= 0 as integers of 2**40ths.

    Every step is one correctly rounded float32 operation (Cody and Waite's reduction, Cephes' polynomial), so any
    implementation gives the same integers, and sums of integers have no order.
    """
    x = x.clamp(min=-60.0)  # below 2**-40 all is 0
    power = torch.round(x * 1.44269504)
    r = x - power * 0.693359375
    r = r - power * -2.12194440e-4
    y = r * 1.9875691500e-4
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
        y = (y + coefficient) * r
    y = (y + 5.0000001201e-1) * (r * r)
    y = (y + r) + 1.0
    return torch.ldexp(y.double(), power.double() + WEIGHT_BITS).long()


def sample(logits: Tensor, params: SamplingTensors, seeds: Tensor, positions: Tensor) -> Tensor:
    logits = torch.where(logits.isnan(), float("-inf"), logits)
    if params.all_greedy:
        return logits.argmax(-1).int()
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    greedy = params.temperature == 0
    x = ordered / torch.where(greedy, 1.0, params.temperature)[:, None]
    x = x.clamp(LOWEST, -LOWEST)
    greedy |= x[:, 0] == LOWEST  # nothing is possible
    x = x - x[:, :1]
    rank = torch.arange(x.shape[1], device=x.device)
    in_top_k = (rank < params.top_k[:, None]) | (params.top_k[:, None] <= 0)
    weights = _weights(x) * in_top_k
    sums = weights.cumsum(-1)
    bound = params.top_p.double()[:, None] * sums[:, -1:].double()
    in_top_p = ((sums - weights).double() < bound) | (params.top_p[:, None] >= 1)
    weights = weights * (in_top_p & (x >= params.log_min_p[:, None]))
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    target = (counter_uniform(seeds, positions)[:, None] * total.double()).long()
    chosen = (sums <= torch.minimum(target, total - 1)).sum(-1, keepdim=True)
    chosen = torch.where(greedy[:, None], 0, chosen)
    return tokens.gather(-1, chosen)[:, 0].int()


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    rows, token_ids = rows.long(), token_ids.long()
    values = logits[rows, token_ids]
    factor = repetition[rows]
    values = torch.where(values > 0, values / factor, values * factor)
    values = values - counts * frequency[rows]
    values = values - (counts > 0) * presence[rows]
    logits[rows, token_ids] = values


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    logits.index_put_((rows.long(), token_ids.long()), values, accumulate=True)


def masked(logits: Tensor, masks: TokenMasks) -> Tensor:
    """A copy of the logits in which the tokens that a row's mask does not allow are -inf."""
    words, rows = masks.words, masks.places.long()
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1).bool().flatten(1)
    allowed = bits[rows.clamp(min=0), : logits.shape[1]] | (rows < 0)[:, None]
    return torch.where(allowed, logits, float("-inf"))


def logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.where(logits.isnan(), float("-inf"), logits)
    normalized = torch.log_softmax(logits, dim=-1)
    values, ids = normalized.sort(dim=-1, descending=True, stable=True)
    chosen = normalized.gather(-1, tokens.long()[:, None])[:, 0]
    return chosen, values[:, :top_n], ids[:, :top_n].int()
