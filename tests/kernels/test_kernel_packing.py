"""Packed weights: nothing is lost that the kind can hold, and wrong sizes are refused."""

import pytest
import torch

from llm_runtime import kernels
from llm_runtime.kernels import packing, reference

SHAPES = [(1, 32), (64, 64), (130, 96), (5000, 160)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_error_is_within_half_a_step(outputs: int, inputs: int, kind: kernels.WeightKind) -> None:
    weight = torch.randn(outputs, inputs)
    packed = kernels.pack_weight(weight, kind=kind)
    assert packed.panels.nbytes == kernels.packed_bytes(kind, outputs, inputs)
    error = (reference.dequantize(packed).float() - weight).abs()
    groups = weight.unflatten(-1, (-1, 32))
    if kind == "int4":
        plain = (groups.amax(-1) - groups.amin(-1)) / 15  # the step of the whole range, without any search
        squares = error.unflatten(-1, (-1, 32)).square().mean(-1)
        assert (squares <= plain.square() / 4).all()
        if squares.numel() >= 64:  # what rounding to that step costs on average: a group may be unlucky
            assert squares.mean() < (plain.square() / 12).mean() * 1.02
    elif kind == "int8":
        assert (error.unflatten(-1, (-1, 32)) <= groups.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    else:
        assert (error <= weight.abs() * (0 if kind == "float32" else 2**-8)).all()
    ids = torch.randint(outputs, (7,))
    assert torch.equal(reference.embedding(ids, packed, torch.float32), reference.dequantize(packed)[ids].float())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_blocks_of_a_file_are_kept(outputs: int, inputs: int) -> None:
    quants = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    scales, minimums = torch.rand(outputs, inputs // 32).half(), torch.randn(outputs, inputs // 32).half()
    packed = kernels.pack_int4(quants, scales, minimums)
    exact = quants.unflatten(-1, (-1, 32)).float() * scales[..., None].float() + minimums[..., None].float()
    assert torch.equal(reference.dequantize(packed), exact.flatten(1))
    first, second = quants.unflatten(-1, (-1, 2, 16)).unbind(-2)
    blocks = torch.zeros(outputs, inputs // 32, 18, dtype=torch.uint8)  # as in a file, not at multiples of 4 bytes
    blocks[..., 2:] = first | (second << 4)
    assert torch.equal(kernels.pack_int4(blocks[..., 2:], scales, minimums).panels, packed.panels)
    # The bytes of a group are those of the file's block: inputs i and i + 16 in byte i.
    block = packed.panels[: packing.INT4_BLOCK_BYTES // 5 * 4].view(4, 4, 16, 4)
    assert torch.equal(block[0, :, 0].flatten(), quants[0, :16] | quants[0, 16:32] << 4)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_constant_and_empty_groups(kind: kernels.WeightKind) -> None:
    weight = torch.tensor([0.0, 0.5, -0.25, 1e-30])[:, None].repeat(1, 64)
    found = reference.dequantize(kernels.pack_weight(weight, kind=kind))
    torch.testing.assert_close(found, weight, atol=1e-7, rtol=1e-3)
    assert kernels.pack_weight(torch.empty(0, 64), kind=kind).panels.numel() == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.pack_weight(torch.randn(4, 48), kind="int4")
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.packed_bytes("int4", 4, 33)
    with pytest.raises(ValueError, match="not known"):
        kernels.packed_bytes("int5", 4, 32)  # type: ignore[arg-type]
    good = kernels.pack_weight(torch.randn(70, 64), kind="int4").panels
    for panels in (good[:-1], good.view(torch.int8), good.repeat(2)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            kernels.PackedWeight(panels, "int4", 70, 64)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.pack_weight(torch.randn(70, 64), good, "int8")
    quants, scales = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 2).half()
    with pytest.raises(ValueError, match="minimums"):
        kernels.pack_int4(quants, scales, scales.float())
    with pytest.raises(ValueError, match="scales"):
        kernels.pack_int4(quants, scales[:, :1], scales)
    with pytest.raises(ValueError, match="uint8"):
        kernels.pack_int4(quants.int(), scales, scales)
    with pytest.raises(ValueError, match="uint8"):
        kernels.pack_int4(quants.view(64, 2, 32), scales, scales)
