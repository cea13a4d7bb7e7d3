"""Norms and the gate of an MLP: one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 1024


@triton.jit
def _rms_norm(
    x, weight, residual, out, token_stride, heads, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one token, or the whole of a token that has none."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    element: tl.constexpr = out.dtype.element_ty
    wide = tl.load(x + row // heads * token_stride + row % heads * width + at, mask=inside, other=0).to(tl.float32)
    if ADDS:
        wide += tl.load(residual + row * width + at, mask=inside, other=0).to(tl.float32)
        tl.store(residual + row * width + at, wide.to(element), mask=inside)
        wide = wide.to(element).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    # Rounded before the product with the weight, as in Hugging Face's Llama.
    normalized = (wide * factor).to(element).to(tl.float32)
    of_weight = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + at, (normalized * of_weight).to(element), mask=inside)


@triton.jit
def _silu_and_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + token * 2 * inner + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + at, mask=inside, other=0).to(tl.float32)
    activated = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * inner + at, (activated * up).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rms_norm`; the heads of a token lie side by side."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, width = (1 if x.dim() == 2 else x.shape[1]), x.shape[-1]
    if x.numel():
        block = triton.next_power_of_2(width)
        _rms_norm[(x.shape[0] * heads,)](
            x, weight, x if residual is None else residual, out, x.stride(0), heads, width, eps,
            ADDS=residual is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    return out, x if residual is None else residual


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    if out.numel():
        grid = (tokens, triton.cdiv(inner, BLOCK_COLUMNS))
        _silu_and_mul[grid](gate_up, out, inner, BLOCK=BLOCK_COLUMNS)
    return out
