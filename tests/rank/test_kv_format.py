"""The page format: what one object says of sizes and places is what tensors over the same bytes hold."""

from __future__ import annotations

import pytest
import torch

from actors.kv_format import KVFormat
from transport import Arena

FORMAT = KVFormat(layers=3, page_size=4, kv_heads=2, head_dim=8, dtype="bfloat16")


def test_a_page_is_one_run_of_bytes() -> None:
    assert FORMAT.page_bytes == 3 * 2 * 4 * 2 * 8 * 2 == 4 * FORMAT.token_bytes
    arena = Arena(Arena.create("kv", 5 * FORMAT.page_bytes + 100))
    cache = FORMAT.tensor(arena.buffer, 5)
    assert cache.shape == (5, 3, 2, 4, 2, 8)
    cache[2:4] = torch.arange(2 * 3 * 2 * 4 * 2 * 8).view(2, 3, 2, 4, 2, 8)
    copied = Arena(Arena.create("other", 5 * FORMAT.page_bytes))
    FORMAT.pages(copied.buffer, 0, 2)[:] = FORMAT.pages(arena.buffer, 2, 2)
    other = FORMAT.tensor(copied.buffer, 5)
    assert torch.equal(other[:2], cache[2:4])
    assert not other[2:].any()


def test_places_outside_the_arena() -> None:
    arena = Arena(Arena.create("kv", 5 * FORMAT.page_bytes))
    for page, count in ((-1, 1), (5, 1), (4, 2), (0, -1)):
        with pytest.raises(IndexError):
            FORMAT.pages(arena.buffer, page, count)
    with pytest.raises(IndexError, match="6 pages do not fit"):
        FORMAT.tensor(arena.buffer, 6)


def test_fingerprints_differ() -> None:
    others = [
        KVFormat(layers=3, page_size=4, kv_heads=2, head_dim=8, dtype="float32"),
        KVFormat(layers=3, page_size=4, kv_heads=1, head_dim=16, dtype="bfloat16"),
        KVFormat(layers=3, page_size=8, kv_heads=2, head_dim=8, dtype="bfloat16"),
    ]
    assert len({each.fingerprint for each in (FORMAT, *others)}) == 4
