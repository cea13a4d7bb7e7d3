"""The C++ kernels as functions of tensors: what `kernels.ops` promises, for float32 and bfloat16 on the CPU.

Callers have made sure that the library is there and that data types, shapes and strides fit.
"""

import ctypes
import struct

import torch
from torch import Tensor

from llm_runtime.kernels.packing import GROUP
from llm_runtime.kernels.types import AttentionMeta, PackedWeight, SamplingTensors, TokenMasks

_NO_MEMORY, _BAD_INDEX = -1, -2
_BITS = {"int8": 8, "int4": 4}

_CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

# The structs that the C++ functions take: P a pointer, q an int64, f a float.
_NORM = struct.Struct("@4P 6q f")
_SILU = struct.Struct("@2P 4q")
_WIDEN = struct.Struct("@2P 2q")
_EMBEDDING = struct.Struct("@3P 4q")
_ATTENTION = struct.Struct("@12P 20q f")
_LINEAR = struct.Struct("@4P 10q")
_LINEAR_QUANTIZED = struct.Struct("@4P 10q")
_EMBEDDING_QUANTIZED = struct.Struct("@3P 5q")
_QUANTIZE = struct.Struct("@4P 2q")
_GRAPH = struct.Struct("@P 2q P")
_UNIFORM = struct.Struct("@3P q")
_ARGMAX = struct.Struct("@P 3q P q")
_SAMPLE = struct.Struct("@P 3q 9P 3q")
_LOGPROBS = struct.Struct("@P 3q 4P 2q")
_PENALTIES = struct.Struct("@P 3q 3P q 3P")
_BIAS = struct.Struct("@P 3q 3P q")


def rms_norm(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape)
    width = weight.shape[0]
    heads = x.shape[-2] if x.dim() > 2 else 1
    library.rms_norm(
        _NORM.pack(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            torch.get_num_threads(),
            x.dtype == torch.bfloat16,
            heads,
            x.stride(0) if x.dim() > 2 else width,
            eps,
        )
    )
    return out, x if residual is None else residual


def silu_and_mul(library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    *rows, width = gate_up.shape
    out = gate_up.new_empty(*rows, width // 2)
    library.silu_and_mul(
        _SILU.pack(
            gate_up.data_ptr(),
            out.data_ptr(),
            gate_up.numel() // width if width else 0,
            width // 2,
            torch.get_num_threads(),
            gate_up.dtype == torch.bfloat16,
        )
    )
    return out


def widen(library: ctypes.CDLL, x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    library.widen(_WIDEN.pack(x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()))
    return out


def embedding(library: ctypes.CDLL, ids: Tensor, weight: Tensor) -> Tensor:
    vocabulary, width = weight.shape
    out = weight.new_empty(*ids.shape, width)
    result = library.embedding(
        _EMBEDDING.pack(
            ids.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            ids.numel(),
            vocabulary,
            width * weight.element_size(),
            torch.get_num_threads(),
        )
    )
    check(result, f"a token is not among the {vocabulary} of the embedding")
    return out


def embedding_quantized(library: ctypes.CDLL, ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(*ids.shape, weight.in_features, dtype=dtype, device="cpu")
    result = library.embedding_quantized(
        _EMBEDDING_QUANTIZED.pack(
            ids.data_ptr(),
            weight.panels.data_ptr(),
            out.data_ptr(),
            ids.numel(),
            weight.out_features,
            weight.in_features,
            _BITS[weight.kind],
            dtype == torch.bfloat16,
        )
    )
    check(result, f"a token is not among the {weight.out_features} of the embedding")
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
    cache_scales: Tensor | None,
) -> Tensor:
    tokens, query_heads, dim = q.shape
    pages, _, page_size, kv_heads, _ = cache.shape
    page_stride, value_stride, *_ = cache.stride()
    scale_page_stride, scale_value_stride, *_ = (0, 0) if cache_scales is None else cache_scales.stride()
    q, q_stride = _heads_together(q)
    k, k_stride = _heads_together(k)
    v, v_stride = _heads_together(v)
    out = q.new_empty(tokens, query_heads, dim)
    result = library.attention(
        _ATTENTION.pack(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            cache.data_ptr(),
            0 if cache_scales is None else cache_scales.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            meta.row_offsets.data_ptr(),
            meta.row_starts.data_ptr(),
            meta.row_slots.data_ptr(),
            meta.page_table.data_ptr(),
            q_stride,
            k_stride,
            v_stride,
            page_stride,
            value_stride,
            scale_page_stride,
            scale_value_stride,
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
            q.dtype == torch.bfloat16,
            _CACHE_TYPES[cache.dtype],
            scale,
        )
    )
    check(result, "the page table names a page that the cache does not have")
    return out


def _heads_together(x: Tensor) -> tuple[Tensor, int]:
    """x [T, H, D] with the heads of a token side by side, and the elements from token to token."""
    stride, *inner = x.stride()
    if inner != [x.shape[2], 1]:
        x = x.contiguous()
        stride = x.stride(0)
    return x, stride


def linear(
    library: ctypes.CDLL, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, wide: bool = False
) -> Tensor:
    if isinstance(weight, PackedWeight):
        packed, data, outputs = True, weight.panels, weight.out_features
    else:
        packed, data, outputs = False, weight, weight.shape[0]
    rows, inputs = x.shape
    out = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device="cpu")
    result = library.linear(
        _LINEAR.pack(
            x.data_ptr(),
            data.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            outputs,
            rows,
            inputs,
            outputs,
            packed,
            torch.get_num_threads(),
            data.dtype == torch.bfloat16,
            x.dtype == torch.bfloat16,
            wide,
        )
    )
    check(result)
    return out


def linear_quantized(
    library: ctypes.CDLL, x: Tensor, weight: PackedWeight, bias: Tensor | None, way: int, wide: bool = False
) -> Tensor:
    """`way`: one of `kernels.cpu.paths`."""
    rows, inputs = x.shape
    out = torch.empty(rows, weight.out_features, dtype=torch.float32 if wide else x.dtype, device="cpu")
    result = library.linear_quantized(
        _LINEAR_QUANTIZED.pack(
            x.data_ptr(),
            weight.panels.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            weight.out_features,
            rows,
            inputs,
            weight.out_features,
            torch.get_num_threads(),
            x.dtype == torch.bfloat16,
            _BITS[weight.kind],
            way,
            wide,
        )
    )
    check(result)
    return out


def quantize_int4(library: ctypes.CDLL, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.packing.quantize_int4`."""
    groups = (*weight.shape[:-1], weight.shape[-1] // GROUP)
    quants = torch.empty(weight.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty(groups, dtype=torch.float16, device="cpu")
    minimums = torch.empty_like(scales)
    library.quantize_int4(
        _QUANTIZE.pack(
            weight.data_ptr(),
            quants.data_ptr(),
            scales.data_ptr(),
            minimums.data_ptr(),
            scales.numel(),
            torch.get_num_threads(),
        )
    )
    return quants, scales, minimums


def counter_uniform(library: ctypes.CDLL, seeds: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(seeds.shape, dtype=torch.float64, device="cpu")
    library.counter_uniform(_UNIFORM.pack(seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), out.numel()))
    return out


def sample(
    library: ctypes.CDLL,
    logits: Tensor,
    params: SamplingTensors,
    seeds: Tensor,
    positions: Tensor,
    masks: TokenMasks | None,
) -> Tensor:
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device="cpu")
    if params.all_greedy and masks is None:
        library.argmax(_ARGMAX.pack(*_logits(logits), tokens.data_ptr(), torch.get_num_threads()))
        return tokens
    result = library.sample(
        _SAMPLE.pack(
            *_logits(logits),
            params.temperature.data_ptr(),
            params.top_p.data_ptr(),
            params.log_min_p.data_ptr(),
            params.top_k.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            tokens.data_ptr(),
            *(
                (0, 0, 0, 0)
                if masks is None
                else (*map(Tensor.data_ptr, masks), masks.words.shape[1], len(masks.words))
            ),
            torch.get_num_threads(),
        )
    )
    check(result, "a row has a mask that is not there")
    return tokens


def logprobs(library: ctypes.CDLL, logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    top_n = min(top_n, vocabulary)
    chosen = torch.empty(rows, dtype=torch.float32, device="cpu")
    values = torch.empty(rows, top_n, dtype=torch.float32, device="cpu")
    ids = torch.empty(rows, top_n, dtype=torch.int32, device="cpu")
    result = library.logprobs(
        _LOGPROBS.pack(
            *_logits(logits),
            tokens.data_ptr(),
            chosen.data_ptr(),
            values.data_ptr(),
            ids.data_ptr(),
            top_n,
            torch.get_num_threads(),
        )
    )
    check(result, "a token is not in the vocabulary")
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
        _PENALTIES.pack(
            *_logits(logits),
            rows.data_ptr(),
            token_ids.data_ptr(),
            counts.data_ptr(),
            rows.numel(),
            repetition.data_ptr(),
            frequency.data_ptr(),
            presence.data_ptr(),
        )
    )
    check(result, "a penalty is for a row or token that the logits do not have")


def add_bias(library: ctypes.CDLL, logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    result = library.add_bias(
        _BIAS.pack(*_logits(logits), rows.data_ptr(), token_ids.data_ptr(), values.data_ptr(), rows.numel())
    )
    check(result, "a bias is for a row or token that the logits do not have")


def _logits(logits: Tensor) -> tuple[int, int, int, int]:
    """The struct `Logits`."""
    return logits.data_ptr(), logits.stride(0), *logits.shape


def graph(library: ctypes.CDLL, operations: int, count: int, times: int) -> None:
    """Runs `count` operations (address of a function, address of its argument) at the address `operations`; writes
    count + 1 times to `times`, unless that is 0."""
    result = library.graph(_GRAPH.pack(operations, count, torch.get_num_threads(), times))
    check(result, "a token or a page is out of bounds")


def check(result: int, bad_index: str = "") -> None:
    """Raises what a function's result says."""
    if result == _NO_MEMORY:
        raise MemoryError("a kernel got no memory to work in")
    if result == _BAD_INDEX:
        raise IndexError(bad_index)
