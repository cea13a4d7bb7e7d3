"""The C++ kernels of latent attention and mixtures of experts, as functions of tensors; see `kernels.cpu.functions`."""

import ctypes
import struct

import torch
from torch import Tensor

from llm_runtime.kernels.cpu.functions import check
from llm_runtime.kernels.cpu.paths import NEVER, VECTORS, limits
from llm_runtime.kernels.packing import PANEL
from llm_runtime.kernels.types import AttentionMeta, PackedWeight

_ROWS, _PANELS = 0, 1
_QUANTIZED = {"int8": 2, "int4": 3}

_ATTENTION = struct.Struct("@12P 19q f")
_HEADS = struct.Struct("@3P 8q")
_ROUTE = struct.Struct("@4P 8q f")
_EXPERTS = struct.Struct("@5P P9q P9q 6q")

_Stack = tuple[int, int, int, int, int, int, int, int, int, int]


def mla_attention(
    library: ctypes.CDLL,
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    interleaved: bool,
) -> Tensor:
    tokens, heads, rank = q_latent.shape
    pages, page_size, _ = cache.shape
    q_latent, q_rope, latent, k_rope = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, latent, k_rope)
    )
    out = q_latent.new_empty(tokens, heads, rank)
    result = library.mla_attention(
        _ATTENTION.pack(
            q_latent.data_ptr(),
            q_rope.data_ptr(),
            latent.data_ptr(),
            k_rope.data_ptr(),
            out.data_ptr(),
            cache.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            meta.row_offsets.data_ptr(),
            meta.row_starts.data_ptr(),
            meta.row_slots.data_ptr(),
            meta.page_table.data_ptr(),
            *q_latent.stride()[:2],
            *q_rope.stride()[:2],
            latent.stride(0),
            k_rope.stride(0),
            cache.stride(0),
            meta.page_table.stride(0),
            meta.num_rows,
            tokens,
            heads,
            rank,
            q_rope.shape[2],
            page_size,
            pages,
            torch.get_num_threads(),
            q_latent.dtype == torch.bfloat16,
            cache.dtype == torch.bfloat16,
            interleaved,
            scale,
        )
    )
    check(result, "the page table names a page that the cache does not have")
    return out


def _in_runs(x: Tensor) -> Tensor:
    """x with the last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def linear_heads(library: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    tokens, heads, inputs = x.shape
    x = _in_runs(x)
    outputs = weight.shape[1]
    out = x.new_empty(tokens, heads, outputs)
    library.linear_heads(
        _HEADS.pack(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *x.stride()[:2],
            tokens,
            heads,
            inputs,
            outputs,
            torch.get_num_threads(),
            x.dtype == torch.bfloat16,
        )
    )
    return out


def route_experts(
    library: ctypes.CDLL,
    logits: Tensor,
    top_k: int,
    scoring: str,
    bias: Tensor | None,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    tokens, count = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device="cpu")
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device="cpu")
    result = library.route_experts(
        _ROUTE.pack(
            logits.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            tokens,
            count,
            top_k,
            groups,
            top_groups,
            scoring == "sigmoid",
            normalize,
            torch.get_num_threads(),
            scaling,
        )
    )
    check(result)
    return ids, weights


def experts(
    library: ctypes.CDLL,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    num_experts: int,
    deterministic: bool,
    shared: Tensor | None,
) -> Tensor:
    tokens, width = x.shape
    out = x.new_empty(tokens, width)
    result = library.experts(
        _EXPERTS.pack(
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            0 if shared is None else shared.data_ptr(),
            out.data_ptr(),
            *_stack(gate_up, num_experts, deterministic),
            *_stack(down, num_experts, deterministic),
            x.stride(0),
            tokens,
            ids.shape[1],
            num_experts,
            torch.get_num_threads(),
            x.dtype == torch.bfloat16,
        )
    )
    check(result, f"a token's expert is not among the {num_experts}")
    return out


def _stack(matrix: Tensor | PackedWeight, count: int, deterministic: bool) -> _Stack:
    """The struct `Stack` of `count` weights, one behind the other."""
    if isinstance(matrix, Tensor):
        rows, inputs = matrix.shape
        narrow = matrix.dtype == torch.bfloat16
        size = PANEL * inputs * matrix.element_size()
        return matrix.data_ptr(), _ROWS, narrow, rows // count, inputs, size, VECTORS, NEVER, NEVER, VECTORS
    panels, outputs, inputs = matrix.panels, matrix.out_features, matrix.in_features
    kind, ways = _PANELS, (VECTORS, NEVER, NEVER, VECTORS)
    if matrix.kind in _QUANTIZED:
        kind, ways = _QUANTIZED[matrix.kind], limits(matrix.kind, outputs // count, inputs, deterministic)
    size = panels.nbytes * PANEL // outputs
    narrow = panels.dtype == torch.bfloat16
    return panels.data_ptr(), kind, narrow, outputs // count, inputs, size, *ways
