"""Latent attention and mixtures of experts in plain torch: what `kernels.ops_moe_mla` documents, on any device."""

import torch
from torch import Tensor

from kernels import reference
from kernels.packing import PANEL
from kernels.types import AttentionMeta, PackedWeight

Matrix = Tensor | PackedWeight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates x [T, heads, D] by the angles [T, D / 2] of each token, in float32; pairs stay where they are."""
    if not interleaved:
        return reference.rotate(x, cos, sin)
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


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
        return q_latent.new_empty(q_latent.shape)
    rank, page_size = latent.shape[1], cache.shape[1]
    rows, positions = meta.row_of_token, meta.positions
    cos, sin = cos[positions], sin[positions]
    q = torch.cat([q_latent.float(), rotate(q_rope, cos, sin, interleaved)], dim=-1) * scale
    key = torch.cat([latent.float(), rotate(k_rope[:, None], cos, sin, interleaved)[:, 0]], dim=-1)
    pages = meta.page_table[meta.row_slots.long()[rows], positions // page_size].long()
    cache[pages, positions % page_size] = key.to(cache.dtype)
    if deterministic:
        return _one_order(q, cache, meta, rank).to(q_latent.dtype)

    # Keys of every row, padded to the longest; pages past a row's end are whatever the table says, and cleared.
    count = -(-meta.max_context // page_size)
    pages = meta.page_table[meta.row_slots.long(), :count].long().clamp(0, cache.shape[0] - 1)
    keys = cache[pages].flatten(1, 2).float()
    at = torch.arange(keys.shape[1], device=q.device)
    ends = meta.row_starts + meta.row_offsets.diff()
    keys = keys.masked_fill((at >= ends[:, None])[..., None], 0)
    column = positions - meta.row_starts.long()[rows]
    queries = q.new_zeros(meta.num_rows, meta.max_query, *q.shape[1:])
    queries[rows, column] = q
    seen = at <= (meta.row_starts[:, None] + torch.arange(meta.max_query, device=q.device))[..., None]
    scores = queries.flatten(1, 2) @ keys.transpose(1, 2)  # [n, queries * heads, keys]
    scores = scores.unflatten(1, (meta.max_query, -1)).masked_fill(~seen[:, :, None], float("-inf"))
    mixed = scores.softmax(-1).flatten(1, 2) @ keys[..., :rank]
    return mixed.unflatten(1, (meta.max_query, -1))[rows, column].to(q_latent.dtype)


def _one_order(q: Tensor, cache: Tensor, meta: AttentionMeta, rank: int) -> Tensor:
    """Attention one token after the other over blocks of keys, always in products of one shape: slow, and the same to
    the bit whatever else is in the step."""
    page_size = cache.shape[1]
    out = q.new_empty(*q.shape[:2], rank)
    block = torch.arange(reference.KEY_BLOCK, device=q.device)
    for token, (row, position) in enumerate(zip(meta.row_of_token.tolist(), meta.positions.tolist(), strict=True)):
        table = meta.page_table[meta.row_slots[row]].long()
        query = q[token]
        peak = query.new_full(query.shape[:1], float("-inf"))
        total = torch.zeros_like(peak)
        mixed = query.new_zeros(len(query), rank)
        for start in range(0, position + 1, reference.KEY_BLOCK):
            at = block + start
            seen = at <= position
            at = at.clamp(max=position)
            keys = cache[table[at // page_size], at % page_size].float()
            scores = (query @ keys.T).masked_fill(~seen, float("-inf"))
            new_peak = torch.maximum(peak, scores.amax(-1))
            weights, old = torch.exp(scores - new_peak[:, None]), torch.exp(peak - new_peak)
            total = total * old + weights.sum(-1)
            mixed = mixed * old[:, None] + weights @ keys[:, :rank].contiguous()
            peak = new_peak
        out[token] = mixed / total[:, None]
    return out


def route_experts(
    logits: Tensor,
    *,
    top_k: int,
    scoring: str,
    bias: Tensor | None,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
        choice = by_group.masked_fill(outside[..., None], float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.int(), weights * scaling


def expert_of(matrix: Matrix, expert: int, num_experts: int) -> Matrix:
    """The weight of one expert, a view."""
    if isinstance(matrix, Tensor):
        size = matrix.shape[0] // num_experts
        return matrix[expert * size : (expert + 1) * size]
    size = len(matrix.panels) // num_experts
    panels = matrix.panels[expert * size : (expert + 1) * size]
    return PackedWeight(panels, matrix.kind, matrix.out_features // num_experts, matrix.in_features)


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, num_experts: int, *, deterministic: bool
) -> Tensor:
    tokens, chosen = ids.shape
    results = x.new_empty(tokens * chosen, x.shape[1], dtype=torch.float32)
    flat = ids.flatten().long()
    if ((flat < 0) | (flat >= num_experts)).any():
        raise IndexError(f"a token's expert is not among the {num_experts}")
    for expert in flat.unique().tolist():
        rows = (flat == expert).nonzero()[:, 0]
        states = x[rows // chosen]
        states = reference.linear(states, expert_of(gate_up, expert, num_experts), None, deterministic)
        states = reference.silu_and_mul(states)
        results[rows] = reference.linear(states, expert_of(down, expert, num_experts), None, deterministic).float()
    weighted = results.view(tokens, chosen, x.shape[1]) * weights[..., None]
    out = torch.zeros_like(weighted[:, 0]) if chosen == 0 else weighted[:, 0]
    for slot in range(1, chosen):
        out = out + weighted[:, slot]
    return out.to(x.dtype)


def head_linear(x: Tensor, weight: Matrix, deterministic: bool) -> Tensor:
    heads = x.shape[1]
    if isinstance(weight, PackedWeight) or deterministic:
        each = [expert_of(weight, head, heads) for head in range(heads)] if isinstance(weight, PackedWeight) else weight
        parts = [reference.linear(x[:, h].contiguous(), w, None, deterministic) for h, w in enumerate(each)]
        return torch.stack(parts, dim=1)
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


def is_run_of_panels(matrix: PackedWeight, num_experts: int) -> bool:
    """Whether each expert's part of a packed weight is a run of whole panels."""
    return matrix.out_features % (num_experts * PANEL) == 0


__all__ = ["expert_of", "experts", "head_linear", "is_run_of_panels", "mla_attention", "rotate", "route_experts"]
