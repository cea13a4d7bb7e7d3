"""How packed weights are laid out: panels of 64 output features, in one plain tensor for each kind.

float32, bfloat16: a tensor [panels, in_features, 64] of that type, where bfloat16 panels with an even number of input
features hold them in pairs, [in_features / 2, 64, 2].

int8: bytes. A panel is a block of 2176 bytes for each group of 32 input features, the last of which is filled up with
zeros, and a block is
    quants    uint8 [4][8][16][4]: byte [a][b][c][d] belongs to output 16 a + c and input 4 b + d of the group
    scales    float16 [64]
and w = scale * (q - 128) for q in 1 .. 255. Scales are those of GGUF's Q8_0, the greatest of a group being 127 of them.

int4: bytes. A panel is a block of 1280 bytes for each group of 32 input features, a block is
    quants    uint8 [4][4][16][4]: byte [a][b][c][d] belongs to output 16 a + c; its low half is input 4 b + d of the
              group, its high half the input 16 + 4 b + d
    scales    float16 [64]
    minimums  float16 [64]
and w = scale * q + minimum for q in 0 .. 15. The bytes of one output feature in a block, [b][d], are those of a Q4_0 or
Q4_1 block of GGUF.

Output features after the last, in the last panel, are zero.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]

Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

PANEL = 64  # output features of a panel
GROUP = 32  # input features that share a scale, and in int4 a minimum
INT4_BLOCK_BYTES = PANEL * GROUP // 2 + 2 * 2 * PANEL
INT8_BLOCK_BYTES = PANEL * GROUP + 2 * PANEL

_SLICE_ROWS = 2048  # weights quantized at a time


def packed_dtype(kind: WeightKind) -> torch.dtype:
    """The type of the tensor that holds a packed weight."""
    match kind:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "int8" | "int4":
            return torch.uint8
    raise ValueError(f"a weight of kind {kind!r} is not known: use one of {', '.join(get_args(WeightKind))}")


def packed_shape(kind: WeightKind, out_features: int, in_features: int) -> tuple[int, ...]:
    """The shape of the tensor that holds a packed weight. Raises ValueError if the kind does not take such a weight."""
    panels = -(-out_features // PANEL)
    match kind:
        case "int4":
            if in_features % GROUP:
                raise ValueError(
                    f"an int4 weight needs a multiple of {GROUP} input features, not {in_features}: use bfloat16 for it"
                )
            return (panels * (in_features // GROUP) * INT4_BLOCK_BYTES,)
        case "int8":
            return (panels * -(-in_features // GROUP) * INT8_BLOCK_BYTES,)
        case _:
            packed_dtype(kind)
            return (panels, in_features, PANEL)


def packed_bytes(kind: WeightKind, out_features: int, in_features: int) -> int:
    """Bytes of a packed weight. Raises ValueError if the kind does not take a weight of these features."""
    count = 1
    for length in packed_shape(kind, out_features, in_features):
        count *= length
    return count * packed_dtype(kind).itemsize


def check_packed(panels: Tensor, kind: WeightKind, out_features: int, in_features: int) -> None:
    """Raises ValueError if a tensor cannot hold such a weight."""
    shape, dtype = packed_shape(kind, out_features, in_features), packed_dtype(kind)
    if panels.shape != shape or panels.dtype != dtype or not panels.is_contiguous():
        raise ValueError(
            f"a packed {kind} weight [{out_features}, {in_features}] is a contiguous {dtype} tensor {list(shape)}, "
            f"not {panels.dtype} {list(panels.shape)}"
        )


def panel_rows(panels: Tensor, out_features: int, first: int, count: int) -> Tensor:
    """Of a packed weight's tensor, the part that holds rows first … first + count. `first` is a multiple of 64.

    Raises ValueError if they do not begin and end where panels do.
    """
    end = first + count
    if first % PANEL or (end % PANEL and end != out_features):
        raise ValueError(f"rows {first} to {end} of {out_features} are not whole panels of {PANEL}")
    part = slice(first // PANEL, -(-end // PANEL))
    if panels.dim() == 1:
        return panels.view(-(-out_features // PANEL), -1)[part].flatten()
    return panels[part]


def pack(weight: Tensor, kind: WeightKind, out: Tensor, quantize: Quantize) -> None:
    """Packs a float weight [out_features, in_features], rounding or quantizing it if need be.

    quantize: what does it for int4, `quantize_int4` or as good.
    """
    for start in range(0, weight.shape[0], _SLICE_ROWS):
        part = weight[start : start + _SLICE_ROWS]
        panels = _panels_of(out, kind, start, part.shape)
        match kind:
            case "int4":
                quants, scales, minimums = quantize(part.float().contiguous())
                _fill_int4(panels, _in_halves(quants), scales, minimums)
            case "int8":
                whole = F.pad(part.float(), (0, -part.shape[1] % GROUP))
                _fill_int8(panels, *quantize_int8(whole))
            case _:
                _fill_floats(panels, part)


def pack_int4(quants: Tensor, scales: Tensor, minimums: Tensor, out: Tensor) -> None:
    """Packs quants [N, K], or [N, K / 32, 16] with two a byte, that have scales and minimums [N, K / 32]."""
    halves = quants if quants.dim() == 3 else _in_halves(quants)
    _fill_int4(out.view(-1, scales.shape[1], INT4_BLOCK_BYTES), halves, scales, minimums)


def unpack(panels: Tensor, kind: WeightKind, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features]: float32 for the quantized kinds, else of its own type."""
    match kind:
        case "int4":
            rows = _unpack_int4(panels.view(-1, in_features // GROUP, INT4_BLOCK_BYTES))
        case "int8":
            rows = _unpack_int8(panels.view(-1, -(-in_features // GROUP), INT8_BLOCK_BYTES))[:, :in_features]
        case _:
            rows = _unpack_floats(panels)
    return rows[:out_features]


def unpack_rows(panels: Tensor, kind: WeightKind, in_features: int, rows: Tensor) -> Tensor:
    """The rows of these numbers (int64 [T]) of a weight, one a number: [T, in_features], of the type `unpack` gives."""
    panel, row = rows // PANEL, rows % PANEL
    match kind:
        case "int4":
            blocks = panels.view(-1, in_features // GROUP, INT4_BLOCK_BYTES)[panel]
            quants = blocks[..., : PANEL * GROUP // 2].unflatten(-1, (4, 4, 16, 4))
            tokens = torch.arange(len(rows), device=rows.device)
            mine = quants[tokens, :, row // 16, :, row % 16].flatten(-2)  # [T, groups, 16]
            scales = blocks[..., PANEL * GROUP // 2 :].contiguous().view(torch.float16).float()
            scale, minimum = scales[tokens, :, row, None], scales[tokens, :, PANEL + row, None]
            return (torch.cat([mine & 15, mine >> 4], dim=-1).float() * scale + minimum).flatten(1)
        case "int8":
            blocks = panels.view(-1, -(-in_features // GROUP), INT8_BLOCK_BYTES)[panel]
            tokens = torch.arange(len(rows), device=rows.device)
            quants = blocks[..., : PANEL * GROUP].unflatten(-1, (4, 8, 16, 4))[tokens, :, row // 16, :, row % 16]
            scales = blocks[..., PANEL * GROUP :].contiguous().view(torch.float16).float()[tokens, :, row]
            return ((quants.flatten(-2).float() - 128) * scales[..., None]).flatten(1)[:, :in_features]
        case _:
            chosen = panels[panel]
            tokens = torch.arange(len(rows), device=rows.device)
            if _in_pairs(panels):
                return chosen.view(len(rows), -1, PANEL, 2)[tokens, :, row].flatten(1)
            return chosen[tokens, :, row]


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [N, K] to uint8 quants [N, K] and float16 scales and minimums [N, K / 32], w = scale * q + minimum.

    Starts from the range of each group, and from ranges a little narrower; scale and minimum are then fitted to the
    rounded values by least squares, and the best of all is taken (as llama.cpp's `make_qkx2_quants` does).
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True)
    high = groups.amax(-1, keepdim=True)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_minimum = torch.zeros_like(low), torch.zeros_like(low)
    for narrower in (0.0, 0.04, 0.08):
        margin = (high - low) * (narrower / 2)
        minimum = low + margin
        scale = (high - low - 2 * margin) / 15
        for fit in (False, True):
            if fit:
                q = _nearest(groups, scale, minimum)
                mean_q, mean_w = q.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
                spread = (q - mean_q).square().sum(-1, keepdim=True)
                slope = ((q - mean_q) * (groups - mean_w)).sum(-1, keepdim=True) / spread
                scale = torch.where((spread > 0) & (slope > 0), slope, scale)
                minimum = torch.where(spread > 0, mean_w - scale * mean_q, minimum)
            scale, minimum = scale.half().float(), minimum.half().float()
            q = _nearest(groups, scale, minimum)
            error = (q * scale + minimum - groups).square().sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
    quants = _nearest(groups, best_scale, best_minimum).to(torch.uint8).flatten(-2)
    return quants, best_scale.squeeze(-1).half(), best_minimum.squeeze(-1).half()


def _nearest(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((groups - minimum) * inverse).round_().clamp_(0, 15)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, K], K a multiple of 32, to int8 [N, K] and float16 scales [N, K / 32], w = scale * q."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scales = (torch.maximum(groups.amax(-1), groups.amin(-1).neg()) / 127).half()
    wide = scales.float()
    inverse = torch.where(wide > 0, 1 / wide, 0)
    return (groups * inverse[..., None]).round_().clamp_(-127, 127).to(torch.int8).flatten(-2), scales


def _panels_of(out: Tensor, kind: WeightKind, first_row: int, shape: torch.Size) -> Tensor:
    """The panels of a packed tensor that hold rows first_row … of a weight, one a line."""
    rows, inputs = shape
    first, last = first_row // PANEL, -(-(first_row + rows) // PANEL)
    match kind:
        case "int4":
            return out.view(-1, inputs // GROUP, INT4_BLOCK_BYTES)[first:last]
        case "int8":
            return out.view(-1, -(-inputs // GROUP), INT8_BLOCK_BYTES)[first:last]
        case _:
            return out[first:last]


def _padded(rows: Tensor, panels: int) -> Tensor:
    """Rows [N, …] and zeros up to whole panels: [panels, 64, …]."""
    missing = panels * PANEL - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.unflatten(0, (panels, PANEL))


def _in_halves(quants: Tensor) -> Tensor:
    """Quants [N, K] two a byte: [N, K / 32, 16]."""
    first, second = quants.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
    return first | (second << 4)


def _fill_int4(panels: Tensor, halves: Tensor, scales: Tensor, minimums: Tensor) -> None:
    """Fills panels with quants, two a byte, [N, groups, 16]. They are moved four bytes at a time."""
    count, groups, _ = panels.shape
    if any(stride % 4 for stride in halves.stride()[:2]) or halves.storage_offset() % 4:
        halves = halves.clone(memory_format=torch.contiguous_format)
    words = _padded(halves.view(torch.int32), count).view(count, 4, 16, groups, 4)
    size = PANEL * GROUP // 2
    panels.view(torch.int32)[..., : size // 4].unflatten(-1, (4, 4, 16)).copy_(words.permute(0, 3, 1, 4, 2))
    values = panels.view(torch.float16)[..., size // 2 :].unflatten(-1, (2, PANEL))
    for i, each in enumerate((scales, minimums)):
        values[:, :, i].copy_(_padded(each, count).transpose(1, 2))


def _unpack_int4(blocks: Tensor) -> Tensor:
    count, groups, _ = blocks.shape
    size = PANEL * GROUP // 2
    both = blocks[..., :size].unflatten(-1, (4, 4, 16, 4)).permute(0, 2, 4, 1, 3, 5).reshape(-1, groups, 16)
    quants = torch.cat([both & 15, both >> 4], dim=-1).float()
    values = blocks[..., size:].contiguous().view(torch.float16).float().view(count, groups, 2, PANEL)
    scales, minimums = values.permute(2, 0, 3, 1).reshape(2, -1, groups, 1)
    return (quants * scales + minimums).flatten(1)


def _fill_int8(panels: Tensor, quants: Tensor, scales: Tensor) -> None:
    """Fills panels with quants [N, K], K a multiple of 32. They are moved four bytes at a time."""
    count, groups, _ = panels.shape
    missing = count * PANEL - len(quants)
    offset = F.pad(quants.view(torch.uint8) ^ 128, (0, 0, 0, missing), value=128)
    words = offset.view(torch.int32).view(count, 4, 16, groups, 8)
    size = PANEL * GROUP
    panels.view(torch.int32)[..., : size // 4].unflatten(-1, (4, 8, 16)).copy_(words.permute(0, 3, 1, 4, 2))
    panels.view(torch.float16)[..., size // 2 :].copy_(_padded(scales, count).transpose(1, 2))


def _unpack_int8(blocks: Tensor) -> Tensor:
    groups = blocks.shape[1]
    size = PANEL * GROUP
    quants = blocks[..., :size].unflatten(-1, (4, 8, 16, 4)).permute(0, 2, 4, 1, 3, 5).reshape(-1, groups, GROUP)
    scales = blocks[..., size:].contiguous().view(torch.float16).float().transpose(1, 2).reshape(-1, groups, 1)
    return ((quants.float() - 128) * scales).flatten(1)


def _in_pairs(panels: Tensor) -> bool:
    """bfloat16 panels hold input features in pairs, as matrix instructions take them."""
    return panels.dtype == torch.bfloat16 and panels.shape[1] % 2 == 0


def _fill_floats(panels: Tensor, weight: Tensor) -> None:
    count, width = len(panels), weight.shape[1]
    rows = _padded(weight, count)
    if _in_pairs(panels):
        panels.view(count, width // 2, PANEL, 2).copy_(rows.view(count, PANEL, width // 2, 2).transpose(1, 2))
    else:
        panels.copy_(rows.transpose(1, 2))


def _unpack_floats(panels: Tensor) -> Tensor:
    count, width, _ = panels.shape
    if _in_pairs(panels):
        return panels.view(count, -1, PANEL, 2).transpose(1, 2).reshape(-1, width)
    return panels.transpose(1, 2).reshape(-1, width)
