"""The Triton kernels as functions of tensors. Callers have made sure that Triton is there and that tensors fit."""

from llm_runtime.kernels.triton.attention import attention
from llm_runtime.kernels.triton.elementwise import rms_norm, silu_and_mul
from llm_runtime.kernels.triton.experts import experts
from llm_runtime.kernels.triton.mla import mla_attention
from llm_runtime.kernels.triton.sampling import sample

__all__ = ["attention", "experts", "mla_attention", "rms_norm", "sample", "silu_and_mul"]
