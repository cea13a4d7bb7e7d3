"""The prefix tree: which KV pages hold which token prefixes (RadixAttention, Zheng et al. 2023, arXiv:2312.07104).

An edge carries whole pages: its label is a packed run of token ids (i32, a multiple of the page size) and the pages
that hold them. Requests with different extra keys never meet: each key has a root of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Node:
    """An edge of the tree and the node below it.

    Attributes:
        key: packed token ids, `len(pages)` pages of them.
        locks: how many requests use the node's pages; above 0 it stays.
        touched: tree time of its last use.
    """

    __slots__ = ("children", "key", "locks", "pages", "parent", "touched")

    def __init__(self, parent: Node | None, key: bytes, pages: list[int], touched: int) -> None:
        self.parent = parent
        self.key = key
        self.pages = pages
        self.touched = touched
        self.locks = 0
        self.children: dict[bytes, Node] = {}


class PrefixTree:
    """Longest-prefix lookup over pages, with reference counts and LRU eviction of whole leaves.

    Args:
        page_size: tokens a page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_bytes = 4 * page_size
        self._roots: dict[bytes, Node] = {}
        self._clock = 0
        self.evictable_pages = 0
        """Pages of nodes that no request uses."""
        self.total_pages = 0

    def match(self, root: bytes, tokens: bytes) -> tuple[Node, list[int]]:
        """The deepest node whose path is a prefix of `tokens` (packed i32), and the pages on the path.

        An edge that matches only in part is split at the last common page.
        """
        self._clock += 1
        node = self._root(root)
        node.touched = self._clock
        pages: list[int] = []
        position = 0
        while (child := node.children.get(tokens[position : position + self._page_bytes])) is not None:
            common = self._common_bytes(child.key, tokens, position)
            if common < len(child.key):
                child = self._split(child, common)
            child.touched = self._clock
            pages += child.pages
            position += common
            node = child
        return node, pages

    def match_length(self, root: bytes, tokens: bytes) -> int:
        """Pages that `match` would return, without touching the tree."""
        node = self._roots.get(root)
        position = 0
        while node is not None:
            node = node.children.get(tokens[position : position + self._page_bytes])
            if node is not None:
                common = self._common_bytes(node.key, tokens, position)
                position += common
                if common < len(node.key):
                    break
        return position // self._page_bytes

    def insert(self, root: bytes, tokens: bytes, pages: list[int]) -> tuple[Node, list[int]]:
        """Makes `tokens` (whole pages, packed) findable under `pages`.

        Returns the node that now ends the path, and the pages on it: those that were there before for the part that was
        known, the given ones for the rest. The given pages of the known part still belong to the caller.
        """
        node, known = self.match(root, tokens)
        position = len(known) * self._page_bytes
        if position < len(tokens):
            fresh = pages[len(known) :]
            child = Node(node, tokens[position:], fresh, self._clock)
            node.children[child.key[: self._page_bytes]] = child
            self.evictable_pages += len(fresh)
            self.total_pages += len(fresh)
            return child, known + fresh
        return node, known

    def lock(self, node: Node) -> None:
        """Keeps the pages from `node` up to its root from eviction."""
        current: Node | None = node
        while current is not None:
            if current.locks == 0:
                self.evictable_pages -= len(current.pages)
            current.locks += 1
            current = current.parent

    def unlock(self, node: Node) -> None:
        """Takes one `lock` back."""
        current: Node | None = node
        while current is not None:
            current.locks -= 1
            if current.locks == 0:
                self.evictable_pages += len(current.pages)
            current = current.parent

    def evict(self, wanted: int) -> list[int]:
        """Frees at least `wanted` pages if so many are evictable: unlocked leaves, least recently used first."""
        leaves = [(node.touched, id(node), node) for node in self._nodes() if not node.children and not node.locks]
        heapq.heapify(leaves)
        freed: list[int] = []
        while leaves and len(freed) < wanted:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            if parent is None:
                continue
            freed += node.pages
            self.evictable_pages -= len(node.pages)
            self.total_pages -= len(node.pages)
            del parent.children[node.key[: self._page_bytes]]
            if not parent.children and not parent.locks:
                heapq.heappush(leaves, (parent.touched, id(parent), parent))
        self._roots = {key: root for key, root in self._roots.items() if root.children or root.locks}
        return freed

    def _root(self, root: bytes) -> Node:
        node = self._roots.get(root)
        if node is None:
            node = self._roots[root] = Node(None, b"", [], self._clock)
        return node

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def _common_bytes(self, key: bytes, tokens: bytes, position: int) -> int:
        """Length of the common prefix of `key` and `tokens[position:]`, in whole pages."""
        if tokens.startswith(key, position):
            return len(key)
        size = self._page_bytes
        common = size  # the caller found the child by its first page
        while key[common : common + size] == tokens[position + common : position + common + size]:
            common += size
        return common

    def _split(self, node: Node, at: int) -> Node:
        """Cuts the edge of `node` after `at` bytes; the new upper node takes its place in the parent."""
        parent, pages = node.parent, at // self._page_bytes
        assert parent is not None
        upper = Node(parent, node.key[:at], node.pages[:pages], node.touched)
        upper.locks = node.locks
        parent.children[upper.key[: self._page_bytes]] = upper
        node.parent, node.key, node.pages = upper, node.key[at:], node.pages[pages:]
        upper.children[node.key[: self._page_bytes]] = node
        return upper
