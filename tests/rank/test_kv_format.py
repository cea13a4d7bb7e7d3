"""The page format: what one object says of sizes and places is what tensors over the same bytes hold."""

from __future__ import annotations

import pytest
import torch

from llm_runtime.actors.kv_format import KVDType, KVFormat
from llm_runtime.transport import Arena

FORMAT = KVFormat(layers=3, page_size=4, kv_heads=2, head_dim=8, dtype="bfloat16")


@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("head_dim", [8, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_page_is_one_run_of_bytes(dtype: KVDType, page_size: int, head_dim: int) -> None:
    pages = KVFormat(layers=3, page_size=page_size, kv_heads=2, head_dim=head_dim, dtype=dtype)
    arena = Arena(Arena.create("kv", 5 * pages.page_bytes + 100))
    cache = pages.cache(arena.buffer, 5)
    assert len(cache) == 5
    assert cache.vectors.shape == (5, 3, 2, page_size, 2, head_dim)
    assert str(cache.vectors.dtype) == f"torch.{dtype}"
    cache.vectors[2:4] = torch.randint(1, 99, (2, 3, 2, page_size, 2, head_dim)).to(cache.vectors.dtype)
    assert (cache.scales is not None) == (dtype == "int8")
    if cache.scales is not None:
        assert cache.scales.shape == (5, 3, 2, page_size, 2)
        cache.scales[2:4] = torch.rand(2, 3, 2, page_size, 2) + 1
    copied = Arena(Arena.create("other", 5 * pages.page_bytes))
    pages.pages(copied.buffer, 0, 2)[:] = pages.pages(arena.buffer, 2, 2)
    other = pages.cache(copied.buffer, 5)
    for ours, theirs in ((cache.vectors, other.vectors), (cache.scales, other.scales)):
        if ours is not None and theirs is not None:
            assert torch.equal(theirs[:2], ours[2:4])
            assert theirs[:2].all()
            assert not theirs[2:].any()
    for layer, (vectors, scales) in enumerate(cache.layers):
        assert torch.equal(vectors, cache.vectors[:, layer])
        assert scales is None or (cache.scales is not None and torch.equal(scales, cache.scales[:, layer]))


def test_sizes() -> None:
    assert FORMAT.page_bytes == 3 * 2 * 4 * 2 * 8 * 2 == 4 * FORMAT.token_bytes
    quantized = KVFormat(layers=30, page_size=16, kv_heads=3, head_dim=64, dtype="int8")
    assert quantized.page_bytes == 30 * 2 * 16 * 3 * (64 + 4) == 16 * quantized.token_bytes
    assert quantized.new_cache(3, torch.device("cpu")).nbytes == 3 * quantized.page_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_of_latents(dtype: KVDType) -> None:
    pages = KVFormat(layers=3, page_size=4, kv_heads=1, head_dim=40, dtype=dtype, kind="mla")
    item = 4 if dtype == "float32" else 2
    assert pages.page_bytes == 3 * 4 * 40 * item == 4 * pages.token_bytes
    assert pages.replicated
    assert not FORMAT.replicated
    arena = Arena(Arena.create("kv", 5 * pages.page_bytes))
    cache = pages.cache(arena.buffer, 5)
    assert (cache.vectors.shape, cache.scales, cache.nbytes) == ((5, 3, 4, 40), None, 5 * pages.page_bytes)
    cache.vectors[2] = torch.randn(3, 4, 40)
    copied = Arena(Arena.create("other", 5 * pages.page_bytes))
    pages.pages(copied.buffer, 1)[:] = pages.pages(arena.buffer, 2)
    other = pages.cache(copied.buffer, 5)
    assert torch.equal(other.vectors[1], cache.vectors[2])
    assert not other.vectors[2:].any()
    assert [tuple(vectors.shape) for vectors, _ in cache.layers] == [(5, 4, 40)] * 3


def test_places_outside_the_arena() -> None:
    arena = Arena(Arena.create("kv", 5 * FORMAT.page_bytes))
    for page, count in ((-1, 1), (5, 1), (4, 2), (0, -1)):
        with pytest.raises(IndexError):
            FORMAT.pages(arena.buffer, page, count)
    with pytest.raises(IndexError, match="6 pages do not fit"):
        FORMAT.cache(arena.buffer, 6)


def test_fingerprints_differ() -> None:
    others = [
        KVFormat(layers=3, page_size=4, kv_heads=2, head_dim=8, dtype="float32"),
        KVFormat(layers=3, page_size=4, kv_heads=2, head_dim=8, dtype="int8"),
        KVFormat(layers=3, page_size=4, kv_heads=1, head_dim=16, dtype="bfloat16"),
        KVFormat(layers=3, page_size=8, kv_heads=2, head_dim=8, dtype="bfloat16"),
        KVFormat(layers=3, page_size=4, kv_heads=1, head_dim=8, dtype="bfloat16", kind="mla"),
        KVFormat(layers=3, page_size=4, kv_heads=1, head_dim=8, dtype="bfloat16"),
    ]
    assert len({each.fingerprint for each in (FORMAT, *others)}) == 7
