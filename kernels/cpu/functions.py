"""The C++ kernels as functions of tensors: what `kernels.ops` promises, for float32 and bfloat16 on the CPU.

Callers have made sure that the library is there and the data types fit.
"""

import ctypes
import struct

import torch
from torch import Tensor

from kernels.types import AttentionMeta, PackedWeight, SamplingTensors

_NO_MEMORY, _BAD_INDEX = -1, -2
# The members of `Call` in attention.cpp and linear.cpp.
_ATTENTION_CALL = struct.Struct("@11P 6q 8q 2q f")
_LINEAR_CALL = struct.Struct("@4P 6q")


def rms_norm(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.rms_norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        eps,
        torch.get_num_threads(),
        x.dtype == torch.bfloat16,
    )
    return out, x if residual is None else residual


def silu_and_mul(library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    library.silu_and_mul(
        gate_up.data_ptr(),
        out.data_ptr(),
        gate_up.numel() // gate_up.shape[-1],
        width,
        torch.get_num_threads(),
        gate_up.dtype == torch.bfloat16,
    )
    return out


def attention(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    tokens, query_heads, dim = q.shape
    pages, _, page_size, kv_heads, _ = cache.shape
    page_stride, value_stride = cache.stride()[:2]
    out = torch.empty((tokens, query_heads, dim), dtype=q.dtype)
    call = _ATTENTION_CALL.pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        cache.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        meta.row_offsets.data_ptr(),
        meta.row_starts.data_ptr(),
        meta.row_slots.data_ptr(),
        meta.page_table.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        page_stride,
        value_stride,
        meta.page_table.stride(0),
        meta.num_rows,
        tokens,
        query_heads,
        kv_heads,
        dim,
        2 * cos.shape[1],
        page_size,
        pages,
        window or 0,
        torch.get_num_threads(),
        scale,
    )
    kinds = (q.dtype == torch.bfloat16) + 2 * (cache.dtype == torch.bfloat16)
    _check(library.attention(call, kinds), "the page table names a page that the cache does not have")
    return out


def linear(library: ctypes.CDLL, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    packed = isinstance(weight, PackedWeight)
    data = weight.panels if isinstance(weight, PackedWeight) else weight
    outputs = weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]
    rows, inputs = x.shape
    out = x.new_empty(rows, outputs)
    call = _LINEAR_CALL.pack(
        x.data_ptr(),
        data.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        rows,
        inputs,
        outputs,
        packed,
        torch.get_num_threads(),
    )
    _check(library.linear(call, x.dtype == torch.bfloat16), "")
    return out


def counter_uniform(library: ctypes.CDLL, seeds: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(seeds.shape, dtype=torch.float64)
    library.counter_uniform(seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), out.numel())
    return out


def sample(library: ctypes.CDLL, logits: Tensor, params: SamplingTensors, seeds: Tensor, positions: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32)
    shape = logits.data_ptr(), logits.stride(0), rows, vocabulary
    if params.all_greedy:
        library.argmax(*shape, tokens.data_ptr(), torch.get_num_threads())
        return tokens
    library.sample(
        *shape,
        params.temperature.data_ptr(),
        params.top_k.data_ptr(),
        params.top_p.data_ptr(),
        params.log_min_p.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens


def logprobs(library: ctypes.CDLL, logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    top_n = min(top_n, vocabulary)
    chosen = torch.empty(rows, dtype=torch.float32)
    values = torch.empty(rows, top_n, dtype=torch.float32)
    ids = torch.empty(rows, top_n, dtype=torch.int32)
    result = library.logprobs(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocabulary,
        tokens.data_ptr(),
        top_n,
        chosen.data_ptr(),
        values.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    _check(result, "a token is not in the vocabulary")
    return chosen, values, ids


def apply_penalties(
    library: ctypes.CDLL,
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    result = library.apply_penalties(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        rows.data_ptr(),
        token_ids.data_ptr(),
        counts.data_ptr(),
        rows.numel(),
        repetition.data_ptr(),
        frequency.data_ptr(),
        presence.data_ptr(),
    )
    _check(result, "a penalty is for a row or token that the logits do not have")


def add_bias(library: ctypes.CDLL, logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    result = library.add_bias(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        rows.data_ptr(),
        token_ids.data_ptr(),
        values.data_ptr(),
        rows.numel(),
    )
    _check(result, "a bias is for a row or token that the logits do not have")


def _check(result: int, bad_index: str) -> None:
    if result == _NO_MEMORY:
        raise MemoryError("a kernel got no memory to work in")
    if result == _BAD_INDEX:
        raise IndexError(bad_index)
