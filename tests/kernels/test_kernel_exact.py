"""int8 and int4 weights beside the same arithmetic done by hand: equal to the bit, whole numbers being exact."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import cpu, packing, reference
from llm_runtime.kernels.cpu import functions, paths
from llm_runtime.kernels.cpu.compile import processor_flags

SHAPES = [(32, 1), (96, 33), (64, 64), (576, 200), (1536, 70)]
ODD_SHAPES = [(1, 5), (33, 96), (575, 130)]
"""Those that int8 has too: inputs that fill no group of 32."""
CASES = [("int8", *shape) for shape in SHAPES + ODD_SHAPES] + [("int4", *shape) for shape in SHAPES]

Floats = NDArray[np.float32]


def linear_by(
    way: int, x: Tensor, weight: kernels.PackedWeight, bias: Tensor | None = None, wide: bool = False
) -> Tensor:
    native = cpu.library()
    assert native is not None
    return functions.linear_quantized(native, x, weight, bias, way, wide)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once."""
    product, added = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = np.asarray(product + added)
    lost = (product - (total - (total - product))) + (added - (total - product))
    # What is not exact is made odd: then rounding it again is as good as rounding once.
    bits = total.view(np.int64)
    bits += np.where((lost != 0) & (bits % 2 == 0), np.where((lost > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def groups_of(x: Tensor) -> Tensor:
    """[rows, groups, 32] in float32, filled up with zeros."""
    return F.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))


def by_hand(x: Tensor, quants: Tensor, scales: Floats, minimums: Floats) -> Tensor:
    """What the kernels compute of w = scale * q + minimum with x in 16 bits, one operation after the other.

    quants: [N, groups, 32]; scales, minimums: [N, groups].
    """
    groups = groups_of(x).numpy()
    most = np.abs(groups).max(-1, keepdims=True)
    some = most > 1e-33
    steps = np.rint(groups * np.where(some, np.float32(127 * 256) / np.where(some, most, np.float32(1)), np.float32(0)))
    x_scales = np.where(some, most / np.float32(127 * 256), np.float32(0))[..., 0]
    x_sums = x_scales * steps.sum(-1)
    sums = torch.einsum("rgi,ngi->grn", torch.from_numpy(steps).double(), quants.double()).numpy()  # whole numbers
    total = np.zeros((len(x), len(quants)), np.float32)
    for group, products in enumerate(sums.astype(np.float32)):
        total = fma(products * scales[:, group], x_scales[:, group, None], total)
        total = fma(minimums[:, group], x_sums[:, group, None], total)
    return torch.from_numpy(total)


def drawn(kind: kernels.WeightKind, outputs: int, inputs: int) -> tuple[kernels.PackedWeight, Tensor, Floats, Floats]:
    """A weight, and its quants, scales and minimums as `by_hand` takes them."""
    if kind == "int4":
        quants = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        scales, minimums = torch.rand(outputs, inputs // 32).half(), torch.randn(outputs, inputs // 32).half()
        packed = kernels.pack_int4(quants, scales, minimums)
        return packed, quants.unflatten(1, (-1, 32)), scales.float().numpy(), minimums.float().numpy()
    weight = torch.randn(outputs, inputs)
    signed, scales = packing.quantize_int8(groups_of(weight).flatten(1))
    wide = scales.float().numpy()
    return kernels.pack_weight(weight, kind=kind), signed.unflatten(1, (-1, 32)).int() + 128, wide, wide * -128


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("kind", "inputs", "outputs"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_and_tiles_of_bytes_are_exact(
    kind: kernels.WeightKind, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """Whole numbers are added without an error, and all else goes in one order, in every instruction set."""
    packed, quants, scales, minimums = drawn(kind, outputs, inputs)
    x = (torch.randn(100, inputs) * torch.exp(4 * torch.randn(100, inputs))).to(dtype)
    x[5] = 0
    x[6, : inputs // 2] *= 1e-36
    bias = torch.randn(outputs).to(dtype)
    wanted = by_hand(x, quants, scales, minimums)
    for way in (paths.VECTORS, paths.BYTE_TILES):
        assert torch.equal(linear_by(way, x, packed, wide=True), wanted)
        assert torch.equal(linear_by(way, x, packed, bias), (wanted + bias.float()).to(dtype))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_products_of_bfloat16(
    inputs: int, outputs: int, dtype: torch.dtype, use_backend: Callable[[str], None]
) -> None:
    if "avx512_bf16" not in processor_flags():
        pytest.skip("this processor does not multiply pairs of bfloat16")
    use_backend("avx512")
    packed = kernels.pack_weight(torch.randn(outputs, inputs), kind="int4")
    x, bias = torch.randn(100, inputs).to(dtype), torch.randn(outputs).to(dtype)
    exact = x.bfloat16().double() @ reference.dequantize(packed).double().T
    out = linear_by(paths.PAIRS, x, packed, wide=True)
    torch.testing.assert_close(out.double(), exact, atol=2e-6 * inputs**0.5, rtol=1e-6)
    assert torch.equal(linear_by(paths.PAIRS, x, packed, bias), (out + bias.float()).to(dtype))
