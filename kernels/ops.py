"""The operations, each one function whatever runs below it.

On the CPU they run in the C++ library of `kernels.cpu`, built on first use, and the larger part of a step on CUDA
devices in Triton where it can be imported; all else, without a compiler and for data types that neither knows, in the
plain torch of `kernels.reference`. Sizes: `T` new tokens of a
step, `n` rows (sequences) of a step, `B` rows to sample, `V` tokens in the vocabulary. Tensors are contiguous
unless said otherwise.
"""

import ctypes
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_runtime.kernels import packing, reference, triton
from llm_runtime.kernels.cpu import choice, library
from llm_runtime.kernels.cpu import functions as cpu
from llm_runtime.kernels.cpu.paths import tune, way
from llm_runtime.kernels.packing import WeightKind, packed_bytes, packed_dtype, packed_shape
from llm_runtime.kernels.types import AttentionMeta, PackedWeight, SamplingTensors, TokenMasks

FLOATS = (torch.float32, torch.bfloat16)
_QUANTIZED = ("int8", "int4")


def library_for(*tensors: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The C++ library, if it takes these tensors: contiguous, on the CPU, all of `dtype` (of one float type if
    None)."""
    if dtype is None:
        dtype = tensors[0].dtype
        if dtype not in FLOATS:
            return None
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    return library()


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they take these tensors: contiguous, on CUDA devices, of one float type."""
    dtype = tensors[0].dtype
    fits = all(each.is_cuda and each.dtype == dtype and each.is_contiguous() for each in tensors)
    return triton.library() if fits and dtype in FLOATS else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root mean square norm, with the addition before it: returns (normalized, residual).

    x: [T, H], or heads [T, heads, H] with any stride between tokens, float32 or bfloat16; weight: [H] of the same
    dtype. If `residual` [T, H] is given, x is added to it in
    place and the sum is normalized; otherwise x itself is normalized and returned as the residual. Sums are
    float32, and the normalized values are rounded to the dtype before the product with the weight, as in Hugging
    Face's Llama.
    """
    # Tokens may lie apart where each token's heads are side by side.
    token = x[0] if x.dim() == 3 and len(x) and residual is None else x
    given = (token, weight) if residual is None else (token, weight, residual)
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not fit the weight {tuple(weight.shape)} or the residual")
    if native := library_for(*given):
        return cpu.rms_norm(native, x, weight, eps, residual)
    if compiled := triton_for(*given):
        return compiled.rms_norm(x, weight, eps, residual)
    return reference.rms_norm(x, weight, eps, residual)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for gate_up = [T, 2 I] with the gate first: [T, I]."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: gate and up cannot share {gate_up.shape[-1]} columns equally")
    if native := library_for(gate_up):
        return cpu.silu_and_mul(native, gate_up)
    if gate_up.dim() == 2 and (compiled := triton_for(gate_up)):
        return compiled.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)


def widen(x: Tensor) -> Tensor:
    """x as float32; x itself if it is that already."""
    if x.dtype == torch.bfloat16 and (native := library_for(x)):
        return cpu.widen(native, x)
    return x.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    window: int | None = None,
    deterministic: bool = False,
    cache_scales: Tensor | None = None,
) -> Tensor:
    """Rotates q and k, writes k and v into the cache, and attends causally: [T, Hq, D] of q's dtype.

    q: [T, Hq, D], k and v: [T, Hkv, D], float32 or bfloat16, heads contiguous, any stride between tokens (they may
    be parts of one fused projection); cache: one layer's pages [num_pages, 2 (k, v), page_size, Hkv, D], float32,
    bfloat16 or int8, any stride between pages; cos, sin: float32 [max_positions, R / 2], the tables of `rotary_table`,
    where R <= D dimensions are rotated; scale: factor on the scores, usually D ** -0.5; window: number of keys a
    query sees, itself included (all if None); cache_scales: float32 [num_pages, 2, page_size, Hkv], what the vectors
    of an int8 cache are to be multiplied with, written along with them; None for other caches.

    The C++ kernel is deterministic always: a token's result depends on its position and its keys alone, to the bit.
    `deterministic` asks the same of Triton, where rows of many tokens take longer then, and of the torch path, which is
    slow. Where the processor has matrix registers
    (AMX) and queries and cache are bfloat16, rotated queries and the weights of keys are rounded to it too.
    """
    _check_attention(q, k, v, cache, meta, cos, sin, window, cache_scales)
    together = cache.stride()[2:] == (k.shape[1] * k.shape[2], k.shape[2], 1) and (
        cache_scales is None or cache_scales.stride()[2:] == (k.shape[1], 1)
    )
    known = q.dtype == k.dtype == v.dtype in FLOATS and (cache.dtype in FLOATS or cache.dtype == torch.int8)
    if together and known:
        if cache.is_cpu and (native := library_for(cos, sin, dtype=torch.float32)):
            return cpu.attention(native, q, k, v, cache, meta, cos, sin, scale, window, cache_scales)
        if cache.is_cuda and (compiled := triton.library()):
            q, k, v = (_side_by_side(each) for each in (q, k, v))
            return compiled.attention(q, k, v, cache, meta, cos, sin, scale, window, deterministic, cache_scales)
    return reference.attention(q, k, v, cache, meta, cos, sin, scale, window, deterministic, cache_scales)


def _side_by_side(heads: Tensor) -> Tensor:
    """Heads [T, heads, D] that lie side by side, whatever is between tokens."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    meta: AttentionMeta,
    cos: Tensor,
    sin: Tensor,
    window: int | None,
    cache_scales: Tensor | None,
) -> None:
    """Raises ValueError if the tensors do not fit each other or the step."""
    tokens, query_heads, dim = q.shape
    _, two, page_size, kv_heads, cache_dim = cache.shape
    if k.shape != (tokens, kv_heads, dim) or v.shape != k.shape or cache_dim != dim or two != 2:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and the cache "
            f"{tuple(cache.shape)} do not fit each other"
        )
    if (cache.dtype == torch.int8) != (cache_scales is not None) or (
        cache_scales is not None and (cache_scales.shape != cache.shape[:-1] or cache_scales.dtype != torch.float32)
    ):
        raise ValueError("attention: an int8 cache needs float32 scales, one a vector, and others have none")
    if query_heads % kv_heads:
        raise ValueError(f"attention: {query_heads} query heads cannot share {kv_heads} key heads equally")
    if tokens != meta.num_tokens:
        raise ValueError(f"attention: {tokens} tokens were given for a step of {meta.num_tokens}")
    positions, half = cos.shape
    if sin.shape != cos.shape or 2 * half > dim:
        raise ValueError(f"attention: tables of {half} angles do not fit heads of {dim} dimensions, or each other")
    if meta.max_context > positions or meta.max_context > meta.page_table.shape[1] * page_size:
        raise ValueError(
            f"attention: a context of {meta.max_context} tokens exceeds the {positions} positions of the rotary table "
            f"or the {meta.page_table.shape[1]} pages of {page_size} of the page table"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: a window of {window} keys sees nothing")


def embedding(ids: Tensor, weight: Tensor | PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of weight [V, H] for int64 ids [T]: [T, H], of a plain weight's own type.

    Rows of a packed weight, say of an output layer that shares the embedding, are put together again in `dtype`.
    Raises IndexError if an id is not below V (on the CPU).
    """
    native = library_for(ids, dtype=torch.int64)
    if isinstance(weight, Tensor):
        if native and library_for(weight):
            return cpu.embedding(native, ids, weight)
    elif weight.panels.device != ids.device:
        raise ValueError(f"embedding: the ids are on {ids.device} and the weight on {weight.panels.device}")
    elif native and weight.kind in _QUANTIZED and dtype in FLOATS:
        return cpu.embedding_quantized(native, ids, weight, dtype)
    return reference.embedding(ids, weight, dtype)


def pack_weight(weight: Tensor, out: Tensor | None = None, kind: WeightKind | None = None) -> PackedWeight:
    """Packs a float weight [N, K] for `linear`, into `out` if given (part of a shared arena, say).

    out: of `packed_dtype(kind)` and `packed_shape(kind, N, K)`; kind: that of the weight's own type if None. int8 has
    a float16 scale for 32 input features each; int4 has a scale and a minimum, fitted to them.
    Raises ValueError if `out` does not fit, or if the kind does not take such a weight (int4: K must be a multiple
    of 32).
    """
    outputs, inputs = weight.shape
    if kind is None:
        if weight.dtype not in FLOATS:
            raise ValueError(f"pack_weight: say which kind a weight of {weight.dtype} shall be")
        kind = "float32" if weight.dtype == torch.float32 else "bfloat16"
    packed = _packed(weight, kind, outputs, inputs, out)
    native = library() if kind == "int4" and weight.is_cpu else None
    quantize = packing.quantize_int4 if native is None else partial(cpu.quantize_int4, native)
    packing.pack(weight, kind, packed.panels, quantize)
    return packed


def pack_int4(quants: Tensor, scales: Tensor, minimums: Tensor, out: Tensor | None = None) -> PackedWeight:
    """Packs a weight that is quantized already, as it is: w = scale * q + minimum.

    quants: uint8, [N, K], each 0 .. 15, or two a byte as in GGUF's blocks, [N, K / 32, 16], where byte i holds the
    inputs i (its low half) and 16 + i of a group; scales, minimums: float16 [N, K / 32]; out: as for `pack_weight`.
    Blocks of GGUF's Q4_1 are that (d and m), those of Q4_0 with -8 d as the minimum, both exact in float16 but for a
    d that overflows. Raises ValueError if the tensors do not fit each other.
    """
    if quants.dtype != torch.uint8 or quants.dim() not in (2, 3) or (quants.dim() == 3 and quants.shape[2] != 16):
        raise ValueError(
            f"pack_int4: quants must be uint8 [N, K] or [N, K / 32, 16], not {quants.dtype} {list(quants.shape)}"
        )
    outputs, inputs = quants.shape[0], quants.shape[1] * (1 if quants.dim() == 2 else packing.GROUP)
    packed = _packed(quants, "int4", outputs, inputs, out)
    groups = (outputs, inputs // packing.GROUP)
    for name, values in (("scales", scales), ("minimums", minimums)):
        if values.shape != groups or values.dtype != torch.float16:
            raise ValueError(
                f"pack_int4: {name} must be float16 {list(groups)}, not {values.dtype} {list(values.shape)}"
            )
    packing.pack_int4(quants, scales, minimums, packed.panels)
    return packed


def _packed(like: Tensor, kind: WeightKind, outputs: int, inputs: int, out: Tensor | None) -> PackedWeight:
    if out is None:
        shape = packing.packed_shape(kind, outputs, inputs)
        out = torch.empty(shape, dtype=packing.packed_dtype(kind), device=like.device)
    return PackedWeight(out, kind, outputs, inputs)


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    deterministic: bool = False,
    wide: bool = False,
) -> Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's type, float32 or bfloat16.

    A plain weight has x's type; a packed one may be of any kind. The bias has x's type. With `deterministic` a row's
    result depends on that row alone, to the bit, whatever T is. With `wide` the result is float32; it is not rounded to
    x's type before, but with a bias or `deterministic` on CUDA devices.

    Sums are float32. On the CPU x is rounded on the way, where the C++ kernels run: for a bfloat16 weight to bfloat16,
    where there are matrix registers (AMX); for int8 and int4 to 16 bits with a scale for 32 features each, or without
    `deterministic` to bfloat16, for int4 where the processor multiplies pairs of it, and for both in matrix registers,
    as is faster.
    """
    if isinstance(weight, Tensor) and not deterministic:
        if wide and bias is None and x.is_cuda and x.dtype == torch.bfloat16:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        out = F.linear(x, weight, bias)
        return out.float() if wide else out
    outputs, inputs = (weight.out_features, weight.in_features) if isinstance(weight, PackedWeight) else weight.shape
    if x.dim() != 2 or x.shape[1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"linear: x {tuple(x.shape)} or the bias does not fit a weight of [{outputs}, {inputs}]")
    data = weight.panels if isinstance(weight, PackedWeight) else weight
    if x.stride(1) != 1:
        x = x.contiguous()
    fits = x.is_cpu and x.dtype in FLOATS and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    if isinstance(weight, PackedWeight) and weight.kind in _QUANTIZED:
        if fits and (native := library_for(data, dtype=torch.uint8)):
            chosen = way(weight, x.shape[0], deterministic)
            return cpu.linear_quantized(native, x, weight, bias, chosen, wide)
        return reference.linear(x, weight, bias, deterministic, wide)
    if fits and (native := library_for(data)):
        return cpu.linear(native, x, weight, bias, wide)
    return reference.linear(x, weight, bias, True, wide)


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random numbers in [0, 1) that are a pure function of a seed and a position: float64 [B].

    seeds: int64 [B], all 64 bits used; positions: int64 [B]. The number is the upper 53 bits of the first two words
    of Philox4x32-10 with the seed as key and the position as counter (low word first).
    """
    if native := library_for(seeds, positions, dtype=torch.int64):
        return cpu.counter_uniform(native, seeds, positions)
    return reference.counter_uniform(seeds, positions)


def sample(
    logits: Tensor,
    params: SamplingTensors,
    seeds: Tensor,
    positions: Tensor,
    masks: TokenMasks | None = None,
) -> Tensor:
    """Draws one token a row: int32 [B].

    logits: float32 [B, V]; seeds, positions: int64 [B], see `counter_uniform`. Temperature, then top-k, top-p and
    min-p, then the inverse of the cumulative distribution over what is left, most likely token first, the lower id
    first among equals. A temperature of 0 takes the first of that order. All sums are over integers (2**40 for the
    most likely token), so every implementation draws the same token, and a row's token does not depend on the
    batch. NaN counts as -inf. top-p keeps a token while the probability before it is below p, of what top-k left;
    min-p keeps tokens with at least that fraction of the highest probability. At least one token is kept.
    Rows with a mask draw as if the logits of all other tokens were -inf.
    """
    rows = logits.shape[0]
    if not len(seeds) == len(positions) == len(params.temperature) == rows:
        raise ValueError(f"sample: {rows} rows of logits need as many seeds, positions and parameters")
    if masks is not None and (len(masks.places) != rows or masks.words.shape[1] * 32 < logits.shape[1]):
        raise ValueError(f"sample: masks need a place for each of {rows} rows and {logits.shape[1]} bits")
    if (
        library_for(logits, dtype=torch.float32)
        and library_for(params.temperature, params.top_p, params.log_min_p, dtype=torch.float32)
        and library_for(params.top_k, dtype=torch.int32)
        and (masks is None or library_for(*masks, dtype=torch.int32))
        and (native := library_for(seeds, positions, dtype=torch.int64))
    ):
        return cpu.sample(native, logits, params, seeds, positions, masks)
    if masks is not None:
        logits = reference.masked(logits, masks)
    if (
        not params.all_greedy
        and (compiled := triton_for(logits))
        and seeds.is_contiguous()
        and positions.is_contiguous()
    ):
        return compiled.sample(logits, params, seeds, positions)
    return reference.sample(logits, params, seeds, positions)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Applies repetition, frequency and presence penalties to float32 logits [B, V] in place.

    rows, token_ids, counts: int32 [E], one entry for each different token of a row's prompt and output, in any order,
    with the number of times the output holds it (0: in the prompt only). repetition, frequency, presence: float32 [B].
    Repetition (1 is off) divides positive logits and multiplies others, for all entries; then the count times
    frequency and, if the count is not 0, presence are subtracted.
    """
    entries = rows.shape
    if token_ids.shape != entries or counts.shape != entries:
        raise ValueError("apply_penalties: rows, token_ids and counts must have one item an entry")
    if not len(repetition) == len(frequency) == len(presence) == logits.shape[0]:
        raise ValueError(f"apply_penalties: {logits.shape[0]} rows of logits need as many penalties of each kind")
    floats = library_for(logits, repetition, frequency, presence, dtype=torch.float32)
    if floats and (native := library_for(rows, token_ids, counts, dtype=torch.int32)):
        cpu.apply_penalties(native, logits, rows, token_ids, counts, repetition, frequency, presence)
        return
    reference.apply_penalties(logits, rows, token_ids, counts, repetition, frequency, presence)


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Adds values float32 [E] to logits [B, V] in place at rows, token_ids int32 [E]; -inf forbids a token."""
    if not rows.shape == token_ids.shape == values.shape:
        raise ValueError("add_bias: rows, token_ids and values must have one item an entry")
    if (native := library_for(logits, values, dtype=torch.float32)) and library_for(rows, token_ids, dtype=torch.int32):
        cpu.add_bias(native, logits, rows, token_ids, values)
        return
    reference.add_bias(logits, rows, token_ids, values)


def logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities: of tokens int32 [B], and the top_n of each row, lower id first among equals.

    logits: float32 [B, V]. Returns float32 [B], float32 [B, top_n], int32 [B, top_n]. A row's values do not depend on
    the batch.
    """
    if len(tokens) != logits.shape[0]:
        raise ValueError(f"logprobs: {logits.shape[0]} rows of logits need as many tokens, not {len(tokens)}")
    native = library_for(logits, dtype=torch.float32)
    if native and library_for(tokens, dtype=torch.int32):
        return cpu.logprobs(native, logits, tokens, top_n)
    return reference.logprobs(logits, tokens, top_n)


def backend() -> str:
    """What the operations run in for CPU tensors: "avx512", "avx2" or "torch". Builds the library if need be."""
    return "torch" if library() is None else choice()


__all__ = [
    "add_bias",
    "apply_penalties",
    "attention",
    "backend",
    "counter_uniform",
    "embedding",
    "linear",
    "logprobs",
    "pack_int4",
    "pack_weight",
    "packed_bytes",
    "packed_dtype",
    "packed_shape",
    "rms_norm",
    "sample",
    "silu_and_mul",
    "tune",
]
