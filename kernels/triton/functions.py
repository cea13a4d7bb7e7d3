"""The Triton kernels as functions of tensors. Callers have made sure that Triton is there and that tensors fit."""

from kernels.triton.attention import attention
from kernels.triton.elementwise import rms_norm, silu_and_mul
from kernels.triton.experts import experts
from kernels.triton.mla import mla_attention
from kernels.triton.sampling import sample

__all__ = ["attention", "experts", "mla_attention", "rms_norm", "sample", "silu_and_mul"]
