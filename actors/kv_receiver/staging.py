"""Staging: where pages lie between being read and being cut into the heads of the own ranks."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_runtime.actors.kv_pages import RankPages
from llm_runtime.actors.kv_receiver.route import Route

if TYPE_CHECKING:
    from llm_runtime.kernels import KVCache


class Staging:
    """Blocks of memory, each for the pages of one read. Takes memory when first used.

    Args:
        nbytes: of all blocks together.
        blocks: how many there are: as many as there can be reads under way.
        own: the ranks' arenas, into which the pages are cut.
    """

    def __init__(self, nbytes: int, blocks: int, own: Sequence[tuple[RankPages, memoryview]], num_pages: int) -> None:
        self.block_bytes = nbytes // blocks // mmap.PAGESIZE * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, blocks * self.block_bytes)
        self.buffer = memoryview(self._memory)
        self._free = list(range(blocks))
        self._own = own
        self._num_pages = num_pages
        self._caches: list[KVCache] = []

    def take(self) -> int:
        """The offset of a free block."""
        return self._free.pop() * self.block_bytes

    def give_back(self, offset: int) -> None:
        """Frees a block."""
        self._free.append(offset // self.block_bytes)

    def unpack(self, route: Route, offset: int, targets: Sequence[int]) -> None:
        """Copies the heads that each own rank holds out of a block into its pages `targets`."""
        import torch

        if not self._caches:
            torch.set_num_threads(1)  # the other cores belong to the ranks
            self._caches = [rank.format.cache(arena, self._num_pages) for rank, arena in self._own]
        places = torch.tensor(targets)
        for rank, parts in route.sliced.items():
            page_format = route.theirs[rank].format
            size = len(targets) * page_format.page_bytes
            staged = page_format.cache(self.buffer[offset : offset + size], len(targets))
            for part in parts:
                cache = self._caches[part.own_rank]
                cache.vectors[places, :, :, :, part.ours] = staged.vectors[:, :, :, :, part.theirs]
                if cache.scales is not None and staged.scales is not None:
                    cache.scales[places, :, :, :, part.ours] = staged.scales[:, :, :, :, part.theirs]
            offset += size
