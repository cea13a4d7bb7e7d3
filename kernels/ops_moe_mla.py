"""The operations of DeepSeek-like models: latent attention (MLA), and mixtures of experts.

As in `kernels.ops`, each is one function whatever runs below it: the C++ library on the CPU, Triton on CUDA devices
where it can be imported, else plain torch. Sizes: T new tokens of a step, Hq query heads, R the rank of the latent
vectors, D the dimensions that are rotated; E experts, K of them for a token, H the hidden size, I that inside of an
expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import reference_moe_mla as reference
from kernels import triton
from kernels.cpu import functions_moe_mla as cpu
from kernels.cpu import library
from kernels.ops import _FLOATS, _library_for
from kernels.packing import PANEL
from kernels.types import AttentionMeta, PackedWeight

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
    """Absorbed latent attention: rotates q_rope and k_rope, writes the new keys into the cache, and attends causally.

    A key is latent ++ rotated k_rope, one for all query heads, and its first R numbers are its value:
    [T, Hq, R] of q_latent's dtype.

    q_latent: [T, Hq, R] and q_rope: [T, Hq, D], the queries, those of the latent part multiplied with the key's up
    projection already; latent: [T, R], normalized, and k_rope: [T, D]; all float32 or bfloat16, with any stride
    between tokens and heads. cache: one layer's pages [pages, page_size, R + D], float32 or bfloat16, any stride
    between pages. cos, sin: float32 [max_positions, D / 2]. scale: factor on the scores. interleaved: the numbers 2 i
    and 2 i + 1 are rotated together, else i and i + D / 2; they stay where they are.

    On the CPU the C++ kernel gives a token the same bits in whatever step it is. `deterministic` asks the same of the
    other ways. Raises ValueError if the tensors do not fit each other, IndexError for a page that does not exist (C++).
    """
    _check_attention(q_latent, q_rope, latent, k_rope, cache, meta, cos, sin)
    same = q_latent.dtype == q_rope.dtype == latent.dtype == k_rope.dtype
    rank, rotated = latent.shape[1], k_rope.shape[1]
    if q_latent.is_cuda and same and (kernels := triton.library()):
        return kernels.mla_attention(
            q_latent, q_rope, latent, k_rope, cache, meta, cos, sin, scale, interleaved=interleaved
        )
    # Values are read sixteen at a time, into what is behind them.
    whole = -rank % 16 <= rotated
    if (
        same
        and whole
        and q_latent.dtype in _FLOATS
        and cache.is_cpu
        and (native := _library_for(cos, sin, dtype=torch.float32))
    ):
        return cpu.mla_attention(native, q_latent, q_rope, latent, k_rope, cache, meta, cos, sin, scale, interleaved)
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


def _check_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
) -> None:
    tokens, heads, rank = q_latent.shape
    _, page_size, dim = cache.shape
    rotated = k_rope.shape[-1]
    if (
        q_rope.shape != (tokens, heads, rotated)
        or latent.shape != (tokens, rank)
        or k_rope.shape != (tokens, rotated)
        or dim != rank + rotated
    ):
        raise ValueError(
            f"mla_attention: q_latent {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)}, latent "
            f"{tuple(latent.shape)}, k_rope {tuple(k_rope.shape)} and the cache {tuple(cache.shape)} do not fit"
        )
    if cache.dtype not in _FLOATS or cache.stride()[1:] != (dim, 1):
        raise ValueError(
            f"mla_attention: the cache is {cache.dtype} with strides {cache.stride()}, not float32 or bfloat16 with "
            "the vectors of a page side by side"
        )
    if tokens != meta.num_tokens:
        raise ValueError(f"mla_attention: {tokens} tokens were given for a step of {meta.num_tokens}")
    positions, half = cos.shape
    if sin.shape != cos.shape or 2 * half != rotated:
        raise ValueError(f"mla_attention: tables of {half} angles do not fit {rotated} dimensions, or each other")
    if meta.max_context > positions or meta.max_context > meta.page_table.shape[1] * page_size:
        raise ValueError(
            f"mla_attention: a context of {meta.max_context} tokens exceeds the {positions} positions of the rotary "
            f"table or the {meta.page_table.shape[1]} pages of {page_size} of the page table"
        )


def head_linear(x: Tensor, weight: Matrix, deterministic: bool = False) -> Tensor:
    """Each head's part of x [T, heads, K] times the transpose of a weight of its own, of weight [heads, N, K]:
    [T, heads, N].

    x: float32 or bfloat16, with any stride between tokens and heads. The weight is plain, of x's type, or one of
    [heads * N, K] that is packed, of any kind, where N is a multiple of 64. Sums are float32. `deterministic`: as in
    `linear`. Raises ValueError if the two do not fit each other.
    """
    heads = x.shape[1] if x.dim() == 3 else 0
    if isinstance(weight, PackedWeight):
        fits = heads and x.shape[2] == weight.in_features and reference.is_run_of_panels(weight, heads)
        shape = (weight.out_features, weight.in_features)
    else:
        fits = weight.dim() == 3 and heads == weight.shape[0] and x.shape[2] == weight.shape[2]
        fits, shape = fits and x.dtype == weight.dtype, tuple(weight.shape)
    if not fits:
        raise ValueError(f"head_linear: x {x.dtype} {tuple(x.shape)} does not fit a weight of {shape}, or its type")
    if x.is_cpu and x.dtype in _FLOATS and _in_library(weight) and (native := library()):
        return cpu.head_linear(native, x, weight, deterministic)
    return reference.head_linear(x, weight, deterministic)


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
    """The experts of each token, and their weights: int32 [T, K] and float32 [T, K], for K = top_k.

    Scores are the sigmoid or the softmax of logits float32 [T, E]. Those with the highest score plus bias (float32 [E])
    are chosen, the best first and the lower number among equals; of `groups` runs of E / groups experts, only from the
    top_groups whose two best add up to most. The weights are the scores, without bias; `normalize` divides them by
    their sum, and all are multiplied with `scaling`. As DeepSeek-V3 does, and, with one group, most others. Raises
    ValueError if the numbers do not fit each other.
    """
    count = logits.shape[-1]
    if logits.dim() != 2 or logits.dtype != torch.float32 or (bias is not None and bias.shape != (count,)):
        raise ValueError(
            f"route_experts: logits must be float32 [tokens, experts], not {logits.dtype} {list(logits.shape)}, and a "
            "bias have one number an expert"
        )
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"route_experts: scoring {scoring!r} is not known: use softmax or sigmoid")
    if groups < 1 or count % groups or not 1 <= top_groups <= groups or (groups > 1 and count // groups < 2):
        raise ValueError(
            f"route_experts: {count} experts cannot be chosen from {top_groups} of {groups} groups: groups must be "
            "equal, and have two experts or more"
        )
    if not 1 <= top_k <= count // groups * top_groups:
        raise ValueError(f"route_experts: {top_k} experts cannot be chosen from {count // groups * top_groups}")
    given = (logits,) if bias is None else (logits, bias)
    if native := _library_for(*given, dtype=torch.float32):
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
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, num_experts: int, *, deterministic: bool
) -> Tensor:
    """What the chosen experts make of each token, weighted and added up: [T, H] of x's dtype.

    An expert's is down(silu(gate(x)) * up(x)). x: [T, H], float32 or bfloat16; ids: int32 [T, K]; weights: float32
    [T, K]; gate_up: [E * 2 I, H], of each expert first the gate's rows, then those of up; down: [E * H, I]. A matrix is
    plain, of x's type, or packed, of any kind; each expert is a run of whole panels then, so 2 I and H must be
    multiples of 64. The results of a token are added in the order of its ids.

    On the CPU sums are float32 throughout, and activations rounded to bytes for int8 and int4 as in `linear`. With
    `deterministic` a token's result depends on that token alone, to the bit. Raises ValueError if the tensors do not
    fit each other, IndexError for an expert that does not exist (on the CPU).
    """
    _check_experts(x, ids, weights, gate_up, down, num_experts)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.is_cuda and (kernels := triton.library()) and all(_is_float(matrix) for matrix in (gate_up, down)):
        return kernels.experts(x, ids, weights, gate_up, down, num_experts)
    if (
        x.is_cpu
        and x.dtype in _FLOATS
        and _library_for(ids, dtype=torch.int32)
        and (native := _library_for(weights, dtype=torch.float32))
        and all(_in_library(matrix) for matrix in (gate_up, down))
    ):
        return cpu.experts(native, x, ids, weights, gate_up, down, num_experts, deterministic)
    return reference.experts(x, ids, weights, gate_up, down, num_experts, deterministic=deterministic)


def _is_float(matrix: Matrix) -> bool:
    return isinstance(matrix, Tensor) or matrix.kind in ("float32", "bfloat16")


def _in_library(matrix: Matrix) -> bool:
    """Whether the C++ library takes it: contiguous, on the CPU."""
    data = matrix if isinstance(matrix, Tensor) else matrix.panels
    return data.is_cpu and data.is_contiguous() and (data.dtype in _FLOATS or not isinstance(matrix, Tensor))


def _check_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, num_experts: int) -> None:
    tokens, hidden = x.shape
    (up_rows, up_inputs), (down_rows, inner) = _shape(gate_up), _shape(down)
    if up_rows != num_experts * 2 * inner or up_inputs != hidden or down_rows != num_experts * hidden:
        raise ValueError(
            f"experts: gate_up {[up_rows, up_inputs]} and down {[down_rows, inner]} are not {num_experts} experts of "
            f"{hidden} features"
        )
    if ids.dim() != 2 or ids.shape[0] != tokens or weights.shape != ids.shape:
        raise ValueError(
            f"experts: ids {tuple(ids.shape)} and weights {tuple(weights.shape)} do not fit {tokens} tokens"
        )
    for name, matrix in (("gate_up", gate_up), ("down", down)):
        if isinstance(matrix, Tensor):
            if matrix.dtype != x.dtype:
                raise ValueError(f"experts: {name} is {matrix.dtype} and x {x.dtype}: a plain weight has x's type")
        elif not reference.is_run_of_panels(matrix, num_experts):
            raise ValueError(
                f"experts: {name} is packed with {matrix.out_features // num_experts} outputs an expert, which is no "
                f"multiple of {PANEL}: leave it a plain tensor"
            )


def _shape(matrix: Matrix) -> tuple[int, int]:
    if isinstance(matrix, Tensor):
        rows, inputs = matrix.shape
        return rows, inputs
    return matrix.out_features, matrix.in_features


__all__ = ["experts", "head_linear", "mla_attention", "route_experts"]
