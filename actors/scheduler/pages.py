"""KV pages: who has them, and what the arena remembers of them.

The ledger lives in an arena that outlives the scheduler. It says for each page which tokens it holds after which
prefix, and is written only when the step that filled the page has been answered. A restarted scheduler rebuilds the
prefix tree from it, so that the requests of its former incarnation find their pages again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.scheduler.radix import Node, PrefixTree
from llm_runtime.transport import Arena

DIGEST_BYTES = 16


def root_digest(extra_key: str) -> bytes:
    """What stands for the empty prefix of requests with this extra key."""
    return hashlib.blake2b(extra_key.encode(), digest_size=DIGEST_BYTES, person=b"root").digest()


def page_digest(prefix: bytes, tokens: bytes) -> bytes:
    """What stands for a prefix and one more page of packed token ids."""
    return hashlib.blake2b(prefix + tokens, digest_size=DIGEST_BYTES).digest()


def page_ledger_bytes(num_pages: int, page_size: int) -> int:
    """Size of the arena that a `PageLedger` needs."""
    return 8 + num_pages * (DIGEST_BYTES + 4 + 4 + 4 + 4 * page_size)


class PageLedger:
    """What each page holds, as arrays in an arena, one entry a page.

    Attributes:
        tokens: i32[num_pages, page_size], the token ids.
        count: i32[num_pages], how many of them are valid; 0 for a page that holds nothing.
        prefix: u8[num_pages, 16], digest of everything before the page.
        first: i32[num_pages], 1 for the first page of a sequence, whose prefix is a root digest.
        lent: i32[num_pages], 1 for a page that somebody beside this engine's ranks may be writing into.
        epoch: i64[1], see `Attached.kv_epoch`.
    """

    def __init__(self, arena: Arena, num_pages: int, page_size: int) -> None:
        """Raises ValueError when the arena is too small."""
        needed = page_ledger_bytes(num_pages, page_size)
        if arena.size < needed:
            raise ValueError(f"the page ledger needs {needed} bytes and its arena has {arena.size}")
        raw = np.frombuffer(arena.buffer, dtype=np.uint8, count=needed)
        ends = np.cumsum([8, 4 * page_size * num_pages, 4 * num_pages, 4 * num_pages, 4 * num_pages])
        epoch, tokens, count, first, lent, prefix = np.split(raw, ends)
        self.epoch: NDArray[np.int64] = epoch.view(np.int64)
        self.tokens: NDArray[np.int32] = tokens.view(np.int32).reshape(num_pages, page_size)
        # The same once more, for writing a few items: several times as fast as through numpy.
        self._page_size = page_size
        self._tokens = tokens.data.cast("i")
        self._count = count.data.cast("i")
        self.count: NDArray[np.int32] = count.view(np.int32)
        self.first: NDArray[np.int32] = first.view(np.int32)
        self.lent: NDArray[np.int32] = lent.view(np.int32)
        self.prefix: NDArray[np.uint8] = prefix.reshape(num_pages, DIGEST_BYTES)

    def clear(self, pages: list[int]) -> None:
        """Forgets what pages hold. Called before they are given to a request."""
        self.count[pages] = 0

    def match_epoch(self, epoch: int) -> bool:
        """Forgets everything when the KV memory is another one than the ledger speaks of; whether it was the same."""
        if self.epoch[0] == epoch:
            return True
        self.count[:] = 0
        self.epoch[0] = epoch
        return False

    def write(self, page: int, offset: int, tokens: array[int], prefix: bytes, first: bool) -> None:
        """Records tokens at `offset` of a page. The count comes last: a kill in between loses the entry, no more."""
        if offset == 0:
            self.prefix[page] = np.frombuffer(prefix, dtype=np.uint8)
            self.first[page] = first
        at, end = page * self._page_size, offset + len(tokens)
        self._tokens[at + offset : at + end] = tokens
        self._count[page] = end

    def restore(self, tree: PrefixTree) -> tuple[list[int], dict[bytes, list[int]]]:
        """Puts every full page whose whole prefix is still there back into the tree.

        Returns the pages that hold nothing reachable and are not lent, and the partly filled pages by the digest of
        their prefix.
        """
        page_size = self.tokens.shape[1]
        full: dict[bytes, list[int]] = defaultdict(list)
        partial: dict[bytes, list[int]] = defaultdict(list)
        roots: set[bytes] = set()
        for page in np.flatnonzero((self.count > 0) & (self.count <= page_size)).tolist():
            prefix = self.prefix[page].tobytes()
            (full if self.count[page] == page_size else partial)[prefix].append(page)
            if self.first[page] == 1:
                roots.add(prefix)
        reachable: set[bytes] = set(roots)
        kept: set[int] = set()
        stack: list[tuple[bytes, bytes, bytes, list[int]]] = [(root, root, b"", []) for root in roots]
        while stack:
            root, digest, path, pages = stack.pop()
            leaf = True
            for page in full.get(digest, ()):
                tokens = self.tokens[page].tobytes()
                longer = page_digest(digest, tokens)
                if longer not in reachable:  # else the same content twice, of which one page is enough
                    reachable.add(longer)
                    kept.add(page)
                    leaf = False
                    stack.append((root, longer, path + tokens, [*pages, page]))
            if leaf:
                tree.insert(root, path, pages)
        left = {prefix: pages for prefix, pages in partial.items() if prefix in reachable}
        kept.update(page for pages in left.values() for page in pages)
        kept.update(np.flatnonzero(self.lent).tolist())
        return [page for page in range(len(self.count)) if page not in kept], left


class PagePool:
    """All pages of an engine: free, in the prefix tree, or held by requests.

    Args:
        ledger: what the pages held when this scheduler started.
        prefix_cache: keep pages in the tree when no request holds them.

    Attributes:
        last_step: number of the last step that the ranks were sent.
    """

    def __init__(self, ledger: PageLedger, prefix_cache: bool) -> None:
        self.num_pages, self.page_size = ledger.tokens.shape
        self.ledger = ledger
        self.tree = PrefixTree(self.page_size)
        self.prefix_cache = prefix_cache
        self._free, self._partial = ledger.restore(self.tree)
        self._free.reverse()
        self.lent_before: list[int] = np.flatnonzero(ledger.lent).tolist()
        """Pages that a former incarnation had lent; `take_back` makes them free."""
        self.restored_pages = self.num_pages - len(self._free) - len(self.lent_before)
        self.last_step = 0
        self._written_until = np.zeros(self.num_pages, np.int64)  # by page: `last_step` when it was freed

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + self.tree.evictable_pages + sum(map(len, self._partial.values()))

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages, from the tree's least recently used if need be. None if there are not so many."""
        if count > self.available:
            return None
        if count > len(self._free) and self._partial:
            self.drop_partial()
        if count > len(self._free):
            # Looking for leaves costs a walk over the tree, so some pages more are freed at a time.
            self._free += self.tree.evict(max(count - len(self._free), self.num_pages // 64))
        pages = [self._free.pop() for _ in range(count)]
        self.ledger.clear(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Frees pages that no request and no tree node holds."""
        self.ledger.clear(pages)
        self._written_until[pages] = self.last_step
        self._free += pages

    def written_until(self, pages: list[int]) -> int:
        """The last step that may write into pages for those that had them before. Others than the ranks, which run
        steps in their order, must not write before it has been answered."""
        return int(self._written_until[pages].max(initial=0))

    def flush(self) -> int:
        """Forgets all prefixes that no request uses; how many pages that has freed."""
        before = len(self._free)
        self.drop_partial()
        self.give_back(self.tree.evict(self.tree.evictable_pages))
        return len(self._free) - before

    def lend(self, pages: list[int]) -> None:
        """Others than this engine's ranks may write into pages from now on, whatever becomes of this process."""
        self.ledger.clear(pages)
        self.ledger.lent[pages] = 1

    def keep(self, pages: list[int]) -> None:
        """Nobody else writes into pages any more; they stay with their request."""
        self.ledger.lent[pages] = 0

    def take_back(self, pages: list[int]) -> None:
        """Frees lent pages: nobody writes into them any more."""
        self.keep(pages)
        self.give_back(pages)

    def match(self, root: bytes, tokens: bytes) -> tuple[Node, list[int]]:
        """The longest known prefix of packed tokens; its node is locked until `PrefixTree.unlock`."""
        if not self.prefix_cache:
            tokens = b""
        node, pages = self.tree.match(root, tokens)
        self.tree.lock(node)
        return node, pages

    def take_partial(self, prefix: bytes, tokens: bytes) -> tuple[int, int] | None:
        """A page that the former incarnation had filled in part: (page, valid tokens), if it continues `prefix` with a
        prefix of `tokens` (packed). The page belongs to the caller from then on."""
        for page in self._partial.get(prefix, ()):
            count = int(self.ledger.count[page])
            if tokens[: 4 * count] == self.ledger.tokens[page, :count].tobytes() and 4 * count <= len(tokens):
                self._partial[prefix].remove(page)
                return page, count
        return None

    def drop_partial(self) -> None:
        """Frees the partly filled pages that nobody has asked for."""
        for pages in self._partial.values():
            self.give_back(pages)
        self._partial.clear()
