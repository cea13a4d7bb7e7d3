"""ggml's quantized blocks as float32, to the bit as gguf-py computes them (https://github.com/ggml-org/ggml)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dequantize(type_name: str, blocks: Tensor) -> Tensor:
    """Blocks of one ggml type, uint8 [..., n, bytes of a block], as float32 [..., n * values of a block].

    Raises KeyError for a type that is not in DEQUANTIZERS.
    """
    flat = DEQUANTIZERS[type_name](blocks.reshape(-1, blocks.shape[-1]))
    return flat.view(*blocks.shape[:-2], -1)


def four_bits(type_name: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Blocks of a ggml type of 4 bits, uint8 [N, n, bytes of a block], as they are: w = scale * quant + minimum.

    Returns what `kernels.pack_int4` takes: the quants, two a byte, uint8 [N, K / 32, 16], and the scales and minimums
    of groups of 32, float16 [N, K / 32]; None for other types. Exact but for Q4_K's scales, products that are rounded
    to float16.
    """
    convert = _FOUR_BITS.get(type_name)
    if convert is None:
        return None
    quants, scales, minimums = convert(blocks)
    return quants, scales.flatten(1), minimums.flatten(1)


def _q4_0_groups(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = blocks[..., :2].contiguous().view(torch.float16)
    return blocks[..., 2:], scales, scales * -8


def _q4_1_groups(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    halves = blocks[..., :4].contiguous().view(torch.float16)
    return blocks[..., 4:], halves[..., :1], halves[..., 1:]


def _q4_k_groups(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, count, size = blocks.shape
    flat = blocks.reshape(-1, size)
    scales, minimums = _k_scales(flat)
    # A byte here holds a value of one group and the same one of the next; `_nibbles` puts the groups apart.
    low, high = _nibbles(flat[:, 16:].reshape(-1, 4, 32)).view(rows, 8 * count, 2, 16).unbind(2)
    return low | (high << 4), scales.half().view(rows, -1), minimums.neg().half().view(rows, -1)


_FOUR_BITS = {"Q4_0": _q4_0_groups, "Q4_1": _q4_1_groups, "Q4_K": _q4_k_groups}


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of the bytes [..., b], then high halves: uint8 [..., 2, b]."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _fill_nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _fill_nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fill_nibbles(packed: Tensor) -> Tensor:
    """`_nibbles` of [n, 16] as float32 [n, 32], in fewer passes over memory."""
    values = torch.empty(packed.shape[0], 32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bits of [n, 4] bytes, lowest first, as 0 or 16: uint8 [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).view(-1, 32) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:]).view(-1, 32) | _fifth_bits(blocks[:, 2:6])
    return values.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]).view(-1, 32) | _fifth_bits(blocks[:, 4:8])
    return values.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of the 8 groups of Q4_K and Q5_K blocks: float32 [n, 8, 1] each."""
    low, minimum, high = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minimums = torch.cat((minimum & 63, (high >> 4) | ((minimum >> 2) & 48)), dim=1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * minimums.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _k_scales(blocks)
    values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return values.float().mul_(scales).sub_(minimums)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts) & 1
    return (low | (high << 4)).float().mul_(scales).sub_(minimums)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).view(-1, 8, 32)
    scales = (_half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())[..., None]
    return (low | (high << 4)).float().sub_(32).view(-1, 16, 16).mul_(scales)


DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Types that can be loaded: uint8 [n, bytes of a block] to float32 with n times the values of a block."""
