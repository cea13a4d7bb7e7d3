"""The Triton kernels as functions of tensors. Callers have made sure that Triton is there and that tensors fit."""

from kernels.triton.experts import experts
from kernels.triton.mla import mla_attention

__all__ = ["experts", "mla_attention"]
