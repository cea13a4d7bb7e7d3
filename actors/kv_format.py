"""`KVFormat`: the layout of cached keys and values. Nothing else computes an offset into a KV arena."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import torch

    from llm_runtime.kernels import KVCache

KVDType = Literal["float32", "bfloat16", "int8"]
KVKind = Literal["mha", "mla"]

ITEM_BYTES: dict[KVDType, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4


class KVFormat(msgspec.Struct, frozen=True):
    """Pages of keys and values as one rank holds them.

    A page holds `page_size` tokens of all layers. Of kind `mha`: [layers, 2 (key, value)] parts, each the vectors
    [page_size, kv_heads, head_dim] and, if they are int8, behind them their scales, float32 [page_size, kv_heads].
    Of kind `mla`, latent attention: [layers] parts, each the vectors [page_size, head_dim], one for all heads, where
    head_dim is the size of a latent with its rotated key, and kv_heads is 1.
    An arena is pages one after the other, so a page can be copied or sent as one run of bytes.
    """

    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: KVDType
    kind: KVKind = "mha"

    @property
    def replicated(self) -> bool:
        """Whether all ranks of a tensor-parallel group hold the same pages; otherwise each holds its heads' part."""
        return self.kind == "mla"

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.layers * self._parts * self._part_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * self._parts * self.kv_heads * (self.head_dim * ITEM_BYTES[self.dtype] + self._scale_bytes)

    @property
    def fingerprint(self) -> str:
        """Names the layout: two ranks may exchange pages as bytes if theirs are equal."""
        scales = "+scales" if self._scale_bytes else ""
        if self.kind == "mla":
            return f"mla:{self.layers}x{self.page_size}x{self.head_dim}:{self.dtype}"
        return f"mha:{self.layers}x2x{self.page_size}x{self.kv_heads}x{self.head_dim}:{self.dtype}{scales}"

    @property
    def _parts(self) -> int:
        """Runs of vectors that a page has for each layer."""
        return 2 if self.kind == "mha" else 1

    @property
    def _scale_bytes(self) -> int:
        return SCALE_BYTES if self.dtype == "int8" else 0

    @property
    def _vectors_bytes(self) -> int:
        """Bytes from the beginning of a part to its scales."""
        size = self.page_size * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]
        return -(-size // SCALE_BYTES) * SCALE_BYTES if self._scale_bytes else size

    @property
    def _part_bytes(self) -> int:
        return self._vectors_bytes + self.page_size * self.kv_heads * self._scale_bytes

    def pages(self, buffer: memoryview, page: int, count: int = 1) -> memoryview:
        """The bytes of `count` pages from `page` on, of an arena's buffer. Raises IndexError outside of it."""
        end = (page + count) * self.page_bytes
        if page < 0 or count < 0 or end > len(buffer):
            raise IndexError(f"pages {page} to {page + count} are outside an arena of {len(buffer)} bytes")
        return buffer[page * self.page_bytes : end]

    def cache(self, buffer: memoryview, num_pages: int) -> KVCache:
        """The first `num_pages` pages of a writable buffer. Raises IndexError if it is too small."""
        import torch

        if num_pages * self.page_bytes > len(buffer):
            raise IndexError(f"{num_pages} pages do not fit into an arena of {len(buffer)} bytes")
        return self._views(torch.frombuffer(buffer, dtype=torch.uint8, count=num_pages * self.page_bytes), num_pages)

    def new_cache(self, num_pages: int, device: torch.device) -> KVCache:
        """Pages of zeros in memory of their own."""
        import torch

        return self._views(torch.zeros(num_pages * self.page_bytes, dtype=torch.uint8, device=device), num_pages)

    def _views(self, memory: torch.Tensor, num_pages: int) -> KVCache:
        import torch

        from llm_runtime.kernels import KVCache

        def view(dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
            size = dtype.itemsize
            outer = self.page_bytes // size, 2 * self._part_bytes // size, self._part_bytes // size
            shape, strides = (num_pages, self.layers, 2, *shape), (*outer, *strides)
            return memory.view(dtype).as_strided(shape, strides, offset // size)

        heads, dim = self.kv_heads, self.head_dim
        if self.kind == "mla":
            return KVCache(memory.view(getattr(torch, self.dtype)).view(num_pages, self.layers, -1, dim), None)
        vectors = view(getattr(torch, self.dtype), 0, (self.page_size, heads, dim), (heads * dim, dim, 1))
        if not self._scale_bytes:
            return KVCache(vectors, None)
        return KVCache(vectors, view(torch.float32, self._vectors_bytes, (self.page_size, heads), (heads, 1)))
