"""Norms, activations and embeddings against Hugging Face's own layers."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_runtime import kernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 577, 4096])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x, residual = (torch.randn(rows, width).to(dtype) for _ in range(2))
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1.6e-2}
    with torch.no_grad():
        kept = x.clone()
        out, same = kernels.rms_norm(x, norm.weight, 1e-5)
        assert same is x
        assert torch.equal(x, kept)
        torch.testing.assert_close(out, norm(x), **close)
        added = residual + x
        out, returned = kernels.rms_norm(x, norm.weight, 1e-5, residual)
        assert returned is residual
        assert torch.equal(residual, added)
        torch.testing.assert_close(out, norm(added), **close)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads(dtype: torch.dtype) -> None:
    """Heads in a fused projection: tokens lie apart."""
    weight = torch.randn(48).to(dtype)
    for tokens in (0, 1, 30):
        heads = torch.randn(tokens, 9, 48).to(dtype)
        for part in (heads[:, :4], heads[:, 4:7], heads[:, 7:], heads):
            out, _ = kernels.rms_norm(part, weight, 1e-5)
            assert torch.equal(out, kernels.rms_norm(part.reshape(-1, 48), weight, 1e-5)[0].view(part.shape))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 577])
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(33, 2 * width) * 20).to(dtype)
    expected = F.silu(x[:, :width]) * x[:, width:]
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1.6e-2}
    torch.testing.assert_close(kernels.silu_and_mul(x), expected, **close)


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(300, 96).to(dtype), torch.randn(300, 96).to(dtype), torch.randn(96).to(dtype)
    whole = kernels.rms_norm(x, weight, 1e-5, residual.clone())[0], kernels.silu_and_mul(x)
    for count in (1, 2):
        torch.set_num_threads(count)
        for start, end in ((0, 1), (17, 18), (5, 200)):
            part = x[start:end].clone()
            normalized, _ = kernels.rms_norm(part, weight, 1e-5, residual[start:end].clone())
            assert torch.equal(normalized, whole[0][start:end])
            assert torch.equal(kernels.silu_and_mul(part), whole[1][start:end])


@pytest.mark.usefixtures("backend")
def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        kernels.rms_norm(torch.randn(2, 8), torch.randn(9), 1e-5)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.rms_norm(torch.randn(2, 8), torch.randn(8), 1e-5, torch.randn(1, 8))
    with pytest.raises(ValueError, match="share"):
        kernels.silu_and_mul(torch.randn(2, 7))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    weight = torch.randn(1000, 577).to(dtype)
    for count in (0, 1, 300):
        ids = torch.randint(0, 1000, (count,))
        assert torch.equal(kernels.embedding(ids, weight), weight[ids])
    for bad in (-1, 1000):
        with pytest.raises(IndexError):
            kernels.embedding(torch.tensor([5, bad]), weight)


@pytest.mark.usefixtures("backend")
def test_widen() -> None:
    for count in (0, 1, 17, 40_000):
        x = torch.randn(count).bfloat16()
        assert torch.equal(kernels.widen(x), x.float())
    assert kernels.widen(wide := torch.randn(3)) is wide
