"""The operations of DeepSeek-like models: latent attention (MLA), and mixtures of experts.

As in `kernels.ops`, each is one function whatever runs below it: the C++ library on the CPU, Triton on CUDA devices
where it can be imported, else the plain torch of `kernels.reference_moe_mla`. Sizes: `T` new tokens of a step, `Hq`
query heads of a rank, `R` the size of a cached latent vector, `D` the rotated dimensions of a key; `E` experts, `K` of
them for a token, `H` the hidden size, `I` that inside of an expert.
"""

from typing import Literal

import torch
from torch import Tensor

from llm_runtime.kernels import reference_moe_mla as reference
from llm_runtime.kernels import triton
from llm_runtime.kernels.cpu import functions_moe_mla as cpu
from llm_runtime.kernels.ops import FLOATS, library_for
from llm_runtime.kernels.packing import PANEL
from llm_runtime.kernels.reference_moe_mla import mla_prefill
from llm_runtime.kernels.types import AttentionMeta, PackedWeight

Matrix = Tensor | PackedWeight
Scoring = Literal["softmax", "sigmoid"]


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
    """Latent attention in its absorbed form (DeepSeek-V2, https://arxiv.org/abs/2405.04434): [T, Hq, R] of latent's
    type, mixtures of latent vectors, which each head has yet to expand to values.

    Rotates q_rope and k_rope, writes the new latents and rotated keys into the cache, and attends causally: the score
    of a key is scale * (q_latent · latent + q_rope · k_rope).

    q_latent: [T, Hq, R], queries multiplied with their head's matrix for keys; q_rope: [T, Hq, D]; latent: [T, R];
    k_rope: [T, D], one for all heads; float32 or bfloat16, any stride between tokens and heads. cache: one layer's
    pages [num_pages, page_size, R + D], float32 or bfloat16, any stride between pages: latents, and behind each its
    rotated key. cos, sin: float32 [max_positions, D / 2], the tables of `rotary_table`. interleaved: angle i turns the
    dimensions 2 i and 2 i + 1, not i and i + D / 2. A rotated vector is stored as the halves [first of each pair,
    second of each pair] either way.

    With `deterministic` a token's result depends on its position and its keys alone, to the bit; in C++ and Triton it
    always does. Raises ValueError if the tensors do not fit each other or the step, and IndexError, in C++, if the page
    table names a page that the cache does not have.
    """
    reference.check_latent(q_rope, latent, k_rope, cache, meta, cos, sin)
    if q_latent.shape != (*q_rope.shape[:2], latent.shape[1]):
        raise ValueError(f"mla_attention: q_latent {tuple(q_latent.shape)} does not fit q_rope and latent")
    rank, rotated = latent.shape[1], k_rope.shape[1]
    if (
        q_latent.dtype == q_rope.dtype == latent.dtype == k_rope.dtype in FLOATS
        and cache.dtype in FLOATS
        and cache.stride()[1:] == (rank + rotated, 1)
    ):
        if cache.is_cuda and (kernels := triton.library()):
            return kernels.mla_attention(
                q_latent, q_rope, latent, k_rope, cache, meta, cos, sin, scale, interleaved=interleaved
            )
        # Values are read sixteen numbers at a time: the last of them may belong to the rotated part.
        whole = -rank % 16 <= rotated
        if cache.is_cpu and whole and (native := library_for(cos, sin, dtype=torch.float32)):
            return cpu.mla_attention(
                native, q_latent, q_rope, latent, k_rope, cache, meta, cos, sin, scale, interleaved
            )
    return reference.mla_attention(
        q_latent,
        q_rope,
        latent,
        k_rope,
        cache,
        meta,
        cos,
        sin,
        scale,
        interleaved=interleaved,
        deterministic=deterministic,
    )


def linear_heads(x: Tensor, weight: Tensor, *, deterministic: bool) -> Tensor:
    """x [T, G, K], each head g times the transpose of weight [G, N, K][g]: [T, G, N] of x's type, which is weight's.

    x may have any stride between tokens and heads. With `deterministic` a token's result depends on that token alone,
    to the bit; in C++ it always does. Raises ValueError if the tensors do not fit each other.
    """
    if x.dim() != 3 or x.shape[1:] != weight.shape[::2]:
        raise ValueError(f"linear_heads: x {tuple(x.shape)} does not fit the weight {tuple(weight.shape)}")
    if x.dtype == weight.dtype and x.is_cpu and (native := library_for(weight)):
        return cpu.linear_heads(native, x, weight)
    return reference.linear_heads(x, weight, deterministic=deterministic)


def route_experts(
    logits: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    bias: Tensor | None,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and what their results are to be multiplied with: int32 and float32
    [T, K], for K = top_k.

    logits: float32 [T, E], the router's; scoring: what makes scores of them; bias: float32 [E], added to the scores by
    which experts are chosen, and not to those that they are weighted by; groups: experts are chosen from the
    `top_groups` of so many equal parts whose two best experts have the highest scores together; normalize: divide a
    token's scores by their sum; scaling: and multiply with that. Of equals the one with the lower number comes first.
    As DeepSeek-V3 does, and, with one group, most others.

    A token's result depends on that token alone, to the bit. Raises ValueError if the numbers do not fit each other.
    """
    count = logits.shape[-1]
    if logits.dim() != 2 or logits.dtype != torch.float32 or (bias is not None and bias.shape != (count,)):
        raise ValueError(
            f"route_experts: logits must be float32 [tokens, experts], not {logits.dtype} {list(logits.shape)}, and a "
            "bias have one number an expert"
        )
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"route_experts: scoring {scoring!r} is not known: use softmax or sigmoid")
    if groups < 1 or count % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"route_experts: {count} experts are not {groups} equal groups, of which {top_groups} count")
    if not 1 <= top_k <= count // groups * top_groups:
        raise ValueError(f"route_experts: {top_k} experts cannot be chosen from {count // groups * top_groups}")
    given = (logits,) if bias is None else (logits, bias)
    if native := library_for(*given, dtype=torch.float32):
        return cpu.route_experts(native, logits, top_k, scoring, bias, groups, top_groups, normalize, scaling)
    return reference.route_experts(
        logits,
        top_k=top_k,
        scoring=scoring,
        bias=bias,
        groups=groups,
        top_groups=top_groups,
        normalize=normalize,
        scaling=scaling,
    )


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Matrix,
    down: Matrix,
    num_experts: int,
    *,
    deterministic: bool,
    shared: Tensor | None = None,
) -> Tensor:
    """The mixture of each token's experts: [T, H] of x's type, the sum over slots k of weights[:, k] times what expert
    ids[:, k] makes of x, down(silu(gate(x)) * up(x)), added up in float32 in the order of the slots, and `shared`.

    x: [T, H], float32 or bfloat16; ids: int32 [T, K]; weights: float32 [T, K]; gate_up: [E * 2 I, H], of each expert
    the rows of gate and then those of up; down: [E * H, I]; each plain, of x's type, or packed, of any kind, with H and
    2 I multiples of 64, so that an expert is a run of whole panels; shared: [T, H] of x's type, what is added to the
    mixtures, say what an expert makes that all tokens have.

    With `deterministic` a token's result depends on that token alone, to the bit. In C++ what is between the two
    products is float32, or as in `linear` where the weights are quantized. Raises ValueError if the tensors do not fit
    each other, IndexError, on the CPU, if an id is that of no expert.
    """
    _check_experts(x, ids, weights, gate_up, down, num_experts, shared)
    x = x if x.stride(1) == 1 else x.contiguous()
    given = [each if isinstance(each, Tensor) else each.panels for each in (gate_up, down)]
    together = all(each.is_contiguous() for each in (ids, weights, *given, *([] if shared is None else [shared])))
    if together and x.dtype in FLOATS:
        floats = all(each.dtype in FLOATS for each in given)
        if x.is_cuda and floats and (kernels := triton.library()):
            return kernels.experts(x, ids, weights, gate_up, down, num_experts, shared, deterministic=deterministic)
        if x.is_cpu and (native := library_for(ids, dtype=torch.int32)):
            return cpu.experts(native, x, ids, weights, gate_up, down, num_experts, deterministic, shared)
    return reference.experts(x, ids, weights, gate_up, down, num_experts, deterministic=deterministic, shared=shared)


def _check_experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, num_experts: int, shared: Tensor | None
) -> None:
    tokens, hidden = x.shape
    for name, matrix in (("gate_up", gate_up), ("down", down)):
        if isinstance(matrix, Tensor):
            if matrix.dtype != x.dtype:
                raise ValueError(f"experts: {name} is {matrix.dtype} and x {x.dtype}: a plain weight has x's type")
        elif matrix.out_features % (num_experts * PANEL):
            raise ValueError(
                f"experts: the {matrix.out_features / num_experts:g} rows of {name} for an expert are not whole panels "
                f"of {PANEL}: leave it a plain tensor"
            )
    (up_rows, up_inputs), (down_rows, inner) = _shape(gate_up), _shape(down)
    if up_rows != num_experts * 2 * inner or up_inputs != hidden or down_rows != num_experts * hidden:
        raise ValueError(
            f"experts: gate_up {[up_rows, up_inputs]} and down {[down_rows, inner]} are not {num_experts} experts of "
            f"{hidden} features"
        )
    if ids.dim() != 2 or ids.dtype != torch.int32 or ids.shape[0] != tokens or weights.shape != ids.shape:
        raise ValueError(
            f"experts: ids {ids.dtype} {tuple(ids.shape)} and weights {tuple(weights.shape)} do not fit {tokens} tokens"
        )
    if weights.dtype != torch.float32:
        raise ValueError(f"experts: weights are {weights.dtype}, not float32")
    if shared is not None and (shared.shape != x.shape or shared.dtype != x.dtype):
        raise ValueError(f"experts: shared {shared.dtype} {tuple(shared.shape)} does not fit x {tuple(x.shape)}")


def _shape(matrix: Matrix) -> tuple[int, int]:
    if isinstance(matrix, Tensor):
        rows, inputs = matrix.shape
        return rows, inputs
    return matrix.out_features, matrix.in_features


__all__ = ["experts", "linear_heads", "mla_attention", "mla_prefill", "route_experts"]
