"""Tensor functions of the runtime: attention over paged caches, norms, activations, linear layers, sampling.

Every function has a plain torch reference and is the same to its caller whatever runs below. Importing this package
runs no torch operation and starts no thread.
"""

from llm_runtime.kernels import cpu, triton
from llm_runtime.kernels.cuda_graph import CudaGraph
from llm_runtime.kernels.graph import GraphMemory, NotRecordable, SizedGraph, StepGraph
from llm_runtime.kernels.ops import (
    add_bias,
    apply_penalties,
    attention,
    backend,
    counter_uniform,
    embedding,
    linear,
    logprobs,
    pack_int4,
    pack_weight,
    packed_bytes,
    packed_dtype,
    packed_shape,
    rms_norm,
    sample,
    silu_and_mul,
    tune,
    widen,
)
from llm_runtime.kernels.ops_moe_mla import experts, linear_heads, mla_attention, mla_prefill, route_experts
from llm_runtime.kernels.packing import WeightKind
from llm_runtime.kernels.rotary import rotary_table
from llm_runtime.kernels.types import AttentionMeta, KVCache, PackedWeight, SamplingTensors, TokenMasks

__all__ = [
    "AttentionMeta",
    "CudaGraph",
    "GraphMemory",
    "KVCache",
    "NotRecordable",
    "PackedWeight",
    "SamplingTensors",
    "SizedGraph",
    "StepGraph",
    "TokenMasks",
    "WeightKind",
    "add_bias",
    "apply_penalties",
    "attention",
    "backend",
    "counter_uniform",
    "cpu",
    "embedding",
    "experts",
    "linear",
    "linear_heads",
    "logprobs",
    "mla_attention",
    "mla_prefill",
    "pack_int4",
    "pack_weight",
    "packed_bytes",
    "packed_dtype",
    "packed_shape",
    "rms_norm",
    "rotary_table",
    "route_experts",
    "sample",
    "silu_and_mul",
    "triton",
    "tune",
    "widen",
]
