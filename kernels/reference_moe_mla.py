"""Latent attention and mixtures of experts, in plain torch and, for their products, the linear layers of `kernels.ops`.

As documented, and for tensors that have been checked, in `kernels.ops_moe_mla`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_runtime.kernels.ops import linear, silu_and_mul
from llm_runtime.kernels.reference import KEY_BLOCK
from llm_runtime.kernels.types import AttentionMeta, PackedWeight


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
    deterministic: bool,
) -> Tensor:
    if meta.num_tokens == 0:
        return q_latent.new_empty(q_latent.shape, dtype=latent.dtype)
    q_rope = _write(q_rope, latent, k_rope, cache, meta, cos, sin, interleaved)
    query = torch.cat([q_latent.float(), q_rope], dim=-1)
    if deterministic:
        mixed = _absorbed_one_order(query, cache, meta, scale, latent.shape[1])
    elif meta.max_query == 1:
        mixed = _absorbed_decode(query, cache, meta, scale, latent.shape[1])
    else:
        parts = []
        for row, (first, last) in enumerate(meta.token_ranges):
            if first == last:
                continue
            cached = _cached(cache, meta, row, query.dtype)
            keys = cached.expand(query.shape[1], *cached.shape)
            parts.append(_attend(query[first:last], keys, keys, meta, row, scale)[..., : latent.shape[1]])
        mixed = torch.cat(parts)
    return mixed.to(latent.dtype)


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """Latent attention in its expanded form, for rows of many new tokens: [T, Hq, V], values, of latent's type.

    Does what `mla_attention` does between the products with the heads' matrices, and those too, in another order: the
    cached latents are expanded to keys and values once a row, and then attended to as in any attention. Fewer
    operations where the new tokens of a row outnumber its older ones or are some hundreds.

    q_nope: [T, Hq, N], not multiplied with anything; key_weight: [Hq, R, N], value_weight: [Hq, V, R]; the rest as
    for `mla_attention`.
    """
    check_latent(q_rope, latent, k_rope, cache, meta, cos, sin)
    heads, rank, dim = key_weight.shape
    if q_nope.shape != (*q_rope.shape[:2], dim) or latent.shape[1] != rank or len(value_weight) != heads:
        raise ValueError(f"mla_prefill: q_nope {tuple(q_nope.shape)} does not fit the weights or q_rope")
    out = latent.new_empty(len(latent), heads, value_weight.shape[1])
    if meta.num_tokens == 0:
        return out
    q_rope = _write(q_rope, latent, k_rope, cache, meta, cos, sin, interleaved)
    query = torch.cat([q_nope, q_rope.to(q_nope.dtype)], dim=-1)
    for row, (first, last) in enumerate(meta.token_ranges):
        if first == last:
            continue
        latents, rotated = _cached(cache, meta, row, query.dtype).split([rank, q_rope.shape[-1]], dim=-1)
        keys = torch.cat([latents @ key_weight, rotated.expand(heads, *rotated.shape)], dim=-1)
        values = latents @ value_weight.transpose(1, 2)
        out[first:last] = _attend(query[first:last], keys, values, meta, row, scale)
    return out


def check_latent(
    q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: Tensor, meta: AttentionMeta, cos: Tensor, sin: Tensor
) -> None:
    tokens, rank = latent.shape
    dim = k_rope.shape[1]
    if q_rope.shape[::2] != (tokens, dim) or len(k_rope) != tokens or cache.dim() != 3 or cache.shape[2] != rank + dim:
        raise ValueError(
            f"latent attention: q_rope {tuple(q_rope.shape)}, latent {tuple(latent.shape)}, k_rope "
            f"{tuple(k_rope.shape)} and the cache {tuple(cache.shape)} do not fit each other"
        )
    if tokens != meta.num_tokens or cos.shape != sin.shape or cos.shape[1] * 2 != dim:
        raise ValueError(f"latent attention: {tokens} tokens or {dim} rotated dimensions do not fit step or tables")
    room = min(len(cos), meta.page_table.shape[1] * cache.shape[1])
    if meta.max_context > room:
        raise ValueError(f"latent attention: a context of {meta.max_context} tokens exceeds {room} positions")


def _write(
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> Tensor:
    """Writes the new tokens into the cache: q_rope rotated, float32."""
    positions, page_size = meta.positions, cache.shape[1]
    pages = meta.page_table[meta.row_slots.long()[meta.row_of_token], positions // page_size].long()
    cos, sin = cos[positions][:, None], sin[positions][:, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    new = torch.cat([latent.float(), rotated(k_rope[:, None])[:, 0]], dim=-1)
    cache[pages, positions % page_size] = new.to(cache.dtype)
    return rotated(q_rope)


def _cached(cache: Tensor, meta: AttentionMeta, row: int, dtype: torch.dtype) -> Tensor:
    """What is cached of a row: [context, R + D]."""
    slot, end = meta.slots_and_ends[row]
    pages = meta.page_table[slot, : -(-end // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:end].to(dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, row: int, scale: float) -> Tensor:
    """Causal attention of one row: query [L, Hq, N], keys [Hq, context, N], values [Hq, context, V]: [L, Hq, V]."""
    count, context, width = len(query), keys.shape[1], values.shape[2]
    ahead = torch.arange(context, device=query.device) - (context - count)
    seen = ahead <= torch.arange(count, device=query.device)[:, None]
    if width < keys.shape[2]:  # torch is fast for keys and values of one size
        values = F.pad(values, (0, keys.shape[2] - width))
    heads = query.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(heads, keys[None], values[None], attn_mask=seen, scale=scale)
    return out[0, ..., :width].transpose(0, 1)


def _absorbed_decode(query: Tensor, cache: Tensor, meta: AttentionMeta, scale: float, rank: int) -> Tensor:
    """One new token of each row, or none: float32 [T, Hq, W] to [T, Hq, R], all rows at a time."""
    rows = meta.row_of_token
    ends = meta.positions + 1
    count = -(-meta.max_context // cache.shape[1])
    pages = meta.page_table[meta.row_slots.long()[rows], :count].long().clamp(0, len(cache) - 1)
    seen = torch.arange(count * cache.shape[1], device=query.device) < ends[:, None]
    # What is not seen may be anything but NaN times 0.
    keys = cache[pages].flatten(1, 2).to(query.dtype).masked_fill(~seen[..., None], 0)[:, None]
    keys = keys.expand(-1, query.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(query[:, :, None], keys, keys, attn_mask=seen[:, None, None], scale=scale)
    return out[:, :, 0, :rank]


def _absorbed_one_order(query: Tensor, cache: Tensor, meta: AttentionMeta, scale: float, rank: int) -> Tensor:
    """One token after the other over blocks of 64 keys at fixed positions, always in products of one shape: slow, and
    the same to the bit whatever else is in the step. float32 [T, Hq, W] to [T, Hq, R]."""
    page_size = cache.shape[1]
    out = query.new_empty(*query.shape[:2], rank)
    block = torch.arange(KEY_BLOCK, device=query.device)
    for token, (row, position) in enumerate(zip(meta.row_of_token.tolist(), meta.positions.tolist(), strict=True)):
        table = meta.page_table[meta.slots_and_ends[row][0]].long()
        scaled = query[token] * scale
        peak = scaled.new_full(scaled.shape[:1], float("-inf"))
        total = scaled.new_zeros(scaled.shape[:1])
        mixed = scaled.new_zeros(len(scaled), rank)
        for start in range(0, position + 1, KEY_BLOCK):
            at = block + start
            unseen = at > position
            at = at.clamp(max=position)
            keys = cache[table[at // page_size], at % page_size].float()
            scores = (scaled @ keys.T).masked_fill(unseen, float("-inf"))
            new_peak = torch.maximum(peak, scores.amax(-1))
            old = torch.exp(peak - new_peak)
            weights = torch.exp(scores - new_peak[:, None])
            total = total * old + weights.sum(-1)
            mixed = mixed * old[:, None] + weights @ keys[:, :rank]
            peak = new_peak
        out[token] = mixed / total[:, None]
    return out


def linear_heads(x: Tensor, weight: Tensor, *, deterministic: bool) -> Tensor:
    if not deterministic:
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()
    return torch.stack([linear(x[:, head], each, deterministic=True) for head, each in enumerate(weight)], dim=1)


def route_experts(
    logits: Tensor,
    *,
    top_k: int,
    scoring: Literal["softmax", "sigmoid"],
    bias: Tensor | None,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    tokens, count = logits.shape
    wide = logits.double()
    scores = (wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()).float()
    choice = scores if bias is None else scores + bias
    if top_groups < groups:
        parts = choice.view(tokens, groups, count // groups)
        best = parts.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        left_out = best.sort(dim=-1, descending=True, stable=True).indices[:, top_groups:]
        choice = parts.index_put(
            (torch.arange(tokens, device=logits.device)[:, None], left_out), choice.new_full((), float("-inf"))
        ).view(tokens, count)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalize:
        total = weights[:, 0]
        for slot in range(1, top_k):
            total = total + weights[:, slot]
        weights = weights / (total + 1e-20)[:, None]
    return ids.int(), weights * scaling


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    num_experts: int,
    *,
    deterministic: bool,
    shared: Tensor | None,
) -> Tensor:
    tokens, slots = ids.shape
    width = x.shape[1]
    inner = (gate_up.out_features if isinstance(gate_up, PackedWeight) else len(gate_up)) // num_experts
    if ((ids < 0) | (ids >= num_experts)).any():
        raise IndexError(f"a token's expert is not among the {num_experts}")
    order = ids.flatten().sort(stable=True).indices
    counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
    results = x.new_empty(tokens * slots, width)
    at = 0
    for expert, count in enumerate(counts):
        if count:
            mine = order[at : at + count]
            hidden = linear(x[mine // slots], _rows(gate_up, expert * inner, inner), deterministic=deterministic)
            part = _rows(down, expert * width, width)
            results[mine] = linear(silu_and_mul(hidden), part, deterministic=deterministic)
            at += count
    by_slot = results.view(tokens, slots, width)
    total = torch.zeros(tokens, width, device=x.device)
    for slot in range(slots):
        total = total + by_slot[:, slot].float() * weights[:, slot, None]
    return (total if shared is None else total + shared).to(x.dtype)


def _rows(weight: Tensor | PackedWeight, first: int, count: int) -> Tensor | PackedWeight:
    return weight[first : first + count] if isinstance(weight, Tensor) else weight.rows(first, count)
