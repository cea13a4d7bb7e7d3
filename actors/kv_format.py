"""`KVFormat`: the layout of cached keys and values. Nothing else computes an offset into a KV arena."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

KVDType = Literal["float32", "bfloat16"]

ITEM_BYTES: dict[KVDType, int] = {"float32": 4, "bfloat16": 2}


class KVFormat(msgspec.Struct, frozen=True):
    """Pages of keys and values as one rank holds them.

    A page holds `page_size` tokens of all layers: [layers, 2 (key, value), page_size, kv_heads, head_dim], contiguous.
    An arena is pages one after the other, so a page can be copied or sent as one run of bytes.
    """

    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: KVDType

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_size * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """Names the layout: two ranks may exchange pages as bytes if theirs are equal."""
        return f"mha:{self.layers}x2x{self.page_size}x{self.kv_heads}x{self.head_dim}:{self.dtype}"

    def pages(self, buffer: memoryview, page: int, count: int = 1) -> memoryview:
        """The bytes of `count` pages from `page` on, of an arena's buffer. Raises IndexError outside of it."""
        end = (page + count) * self.page_bytes
        if page < 0 or count < 0 or end > len(buffer):
            raise IndexError(f"pages {page} to {page + count} are outside an arena of {len(buffer)} bytes")
        return buffer[page * self.page_bytes : end]

    def tensor(self, buffer: memoryview, num_pages: int) -> Tensor:
        """The first `num_pages` pages of a writable buffer: [num_pages, layers, 2, page_size, kv_heads, head_dim].

        Raises IndexError if the buffer is too small.
        """
        import torch

        if num_pages * self.page_bytes > len(buffer):
            raise IndexError(f"{num_pages} pages do not fit into an arena of {len(buffer)} bytes")
        flat = torch.frombuffer(
            buffer, dtype=getattr(torch, self.dtype), count=num_pages * self.page_bytes // ITEM_BYTES[self.dtype]
        )
        return flat.view(num_pages, self.layers, 2, self.page_size, self.kv_heads, self.head_dim)
