"""Mixtures of experts: tokens sorted by expert, gate and up with the activation, down with the weights, and the sum.

A block of rows has one expert. How many blocks there are is known to the device alone, so as many are started as there
can be, and those left over end at once: no step waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_runtime.kernels.triton.products import narrow
from llm_runtime.kernels.types import PackedWeight

BLOCK_ROWS, MANY_ROWS = 16, 64
BLOCK_OUTPUTS = 64
BLOCK_INPUTS = 32
PLAIN, PANELS, PAIRED_PANELS = 0, 1, 2
"""How a weight lies: in rows, or in panels (`kernels.packing`), or in those that hold input features in pairs."""


@triton.jit
def _offsets(row, k, inputs, LAYOUT: tl.constexpr):
    """Where the elements of a weight are: row [N], k [K] give [N, K]."""
    row = row.to(tl.int64)[:, None]
    k = k[None, :]
    if LAYOUT == 0:
        return row * inputs + k
    if LAYOUT == 1:
        return (row // 64 * inputs + k) * 64 + row % 64
    return (row // 64 * inputs + k // 2 * 2) * 64 + row % 64 * 2 + k % 2


@triton.jit
def _gate_and_up(
    x, weight, between, order, block_expert, block_first, ends, x_stride, inputs, inner, chosen, num_experts,
    LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """between [rows, I], rows sorted by expert: silu(gate) * up."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < num_experts:
        dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
        precision: tl.constexpr = "tf32" if NARROW else "ieee"
        row = tl.load(block_first + block) + tl.arange(0, BLOCK_ROWS)
        in_rows = row < tl.load(ends + expert)
        token = tl.load(order + row, mask=in_rows, other=0) // chosen
        output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        in_outputs = output < inner
        gate = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        up = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        for start in range(0, inputs, BLOCK_INPUTS):
            k = start + tl.arange(0, BLOCK_INPUTS)
            in_inputs = k < inputs
            of_states = in_rows[:, None] & in_inputs[None, :]
            states = tl.load(x + token[:, None] * x_stride + k[None, :], mask=of_states, other=0).to(dtype)
            inside = in_outputs[:, None] & in_inputs[None, :]
            first = _offsets(expert * 2 * inner + output, k, inputs, LAYOUT)
            second = _offsets(expert * 2 * inner + inner + output, k, inputs, LAYOUT)
            of_gate = tl.load(weight + first, mask=inside, other=0).to(dtype)
            of_up = tl.load(weight + second, mask=inside, other=0).to(dtype)
            gate += tl.dot(states, tl.trans(of_gate), input_precision=precision)
            up += tl.dot(states, tl.trans(of_up), input_precision=precision)
        result = gate / (1 + tl.exp(-gate)) * up
        to = between + row.to(tl.int64)[:, None] * inner + output[None, :]
        tl.store(to, result, mask=in_rows[:, None] & in_outputs[None, :])


@triton.jit
def _down(
    between, weight, factors, results, order, block_expert, block_first, ends, inner, hidden, num_experts,
    LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """results [T * K, H], in the order of the ids: each expert's outputs times its weight."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < num_experts:
        dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
        precision: tl.constexpr = "tf32" if NARROW else "ieee"
        row = tl.load(block_first + block) + tl.arange(0, BLOCK_ROWS)
        in_rows = row < tl.load(ends + expert)
        place = tl.load(order + row, mask=in_rows, other=0)
        output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        in_outputs = output < hidden
        sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        for start in range(0, inner, BLOCK_INPUTS):
            k = start + tl.arange(0, BLOCK_INPUTS)
            in_inputs = k < inner
            of_states = in_rows[:, None] & in_inputs[None, :]
            states = tl.load(between + row.to(tl.int64)[:, None] * inner + k[None, :], mask=of_states, other=0).to(
                dtype
            )
            inside = in_outputs[:, None] & in_inputs[None, :]
            lines = tl.load(weight + _offsets(expert * hidden + output, k, inner, LAYOUT), mask=inside, other=0)
            sums += tl.dot(states, tl.trans(lines.to(dtype)), input_precision=precision)
        sums *= tl.load(factors + place, mask=in_rows, other=0)[:, None]
        to = results + place.to(tl.int64)[:, None] * hidden + output[None, :]
        tl.store(to, sums, mask=in_rows[:, None] & in_outputs[None, :])


@triton.jit
def _add_up(results, shared, out, hidden, CHOSEN: tl.constexpr, SHARED: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr):
    """A token's results in the order of its ids, and what is shared."""
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inside = output < hidden
    total = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for slot in range(CHOSEN):
        total += tl.load(results + (token * CHOSEN + slot) * hidden + output, mask=inside, other=0)
    if SHARED:
        total += tl.load(shared + token * hidden + output, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * hidden + output, total, mask=inside)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    num_experts: int,
    shared: Tensor | None,
    *,
    deterministic: bool,
) -> Tensor:
    """See `kernels.ops_moe_mla.experts`; weights are plain or panels of floats."""
    tokens, hidden = x.shape
    chosen = ids.shape[1]
    rows = tokens * chosen
    out = x.new_empty(tokens, hidden)
    if rows == 0:
        return out.zero_() if shared is None else out.copy_(shared)
    block_rows = MANY_ROWS if not deterministic and rows >= MANY_ROWS * num_experts else BLOCK_ROWS
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0)
    last_blocks = ((counts + block_rows - 1) // block_rows).cumsum(0)
    blocks = torch.arange(min(rows, rows // block_rows + num_experts), device=x.device)
    block_expert = torch.searchsorted(last_blocks, blocks, right=True)
    known = block_expert.clamp(max=num_experts - 1)
    before = last_blocks[known] - (counts[known] + block_rows - 1) // block_rows
    block_first = (ends - counts)[known] + (blocks - before) * block_rows

    inner = (gate_up.out_features if isinstance(gate_up, PackedWeight) else len(gate_up)) // (2 * num_experts)
    between = x.new_empty(rows, inner)
    results = torch.empty(rows, hidden, dtype=torch.float32, device=x.device)
    sizes = {"BLOCK_ROWS": block_rows, "BLOCK_OUTPUTS": BLOCK_OUTPUTS, "BLOCK_INPUTS": BLOCK_INPUTS}
    of_blocks = (order, block_expert, block_first, ends)
    data, layout = _layout(gate_up)
    _gate_and_up[(len(blocks), triton.cdiv(inner, BLOCK_OUTPUTS))](
        x, data, between, *of_blocks, x.stride(0), hidden, inner, chosen, num_experts,
        LAYOUT=layout, NARROW=narrow(x, data), **sizes,
    )  # fmt: skip
    data, layout = _layout(down)
    _down[(len(blocks), triton.cdiv(hidden, BLOCK_OUTPUTS))](
        between, data, weights, results, *of_blocks, inner, hidden, num_experts,
        LAYOUT=layout, NARROW=narrow(x, data), **sizes,
    )  # fmt: skip
    _add_up[(tokens, triton.cdiv(hidden, 256))](
        results, out if shared is None else shared, out, hidden,
        CHOSEN=chosen, SHARED=shared is not None, BLOCK_OUTPUTS=256,
    )  # fmt: skip
    return out


def _layout(weight: Tensor | PackedWeight) -> tuple[Tensor, int]:
    if isinstance(weight, Tensor):
        return weight, PLAIN
    paired = weight.panels.dtype == torch.bfloat16 and weight.in_features % 2 == 0
    return weight.panels, PAIRED_PANELS if paired else PANELS
