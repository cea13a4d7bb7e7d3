"""The prefix tree: match, split, insert, lock, evict."""

from __future__ import annotations

from array import array

from llm_runtime.actors.scheduler.radix import PrefixTree

ROOT, OTHER = b"root", b"other"


def packed(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def tree_with(*entries: tuple[bytes, list[int]]) -> PrefixTree:
    tree = PrefixTree(page_size=2)
    for tokens, pages in entries:
        tree.insert(ROOT, tokens, pages)
    return tree


def test_match_returns_the_longest_prefix_in_whole_pages() -> None:
    tree = tree_with((packed(1, 2, 3, 4, 5, 6), [10, 11, 12]))
    assert tree.match(ROOT, packed(1, 2, 3, 4, 9, 9))[1] == [10, 11]
    assert tree.match(ROOT, packed(1, 2, 3, 9))[1] == [10]
    assert tree.match(ROOT, packed(1, 9))[1] == []
    assert tree.match(ROOT, packed(1, 2, 3, 4, 5, 6, 7))[1] == [10, 11, 12]
    assert tree.match(ROOT, b"")[1] == []
    assert tree.match_length(ROOT, packed(1, 2, 3, 4, 9, 9)) == 2


def test_keys_with_other_roots_do_not_meet() -> None:
    tree = tree_with((packed(1, 2), [10]))
    assert tree.match(OTHER, packed(1, 2))[1] == []
    tree.insert(OTHER, packed(1, 2), [20])
    assert tree.match(ROOT, packed(1, 2))[1] == [10]
    assert tree.match(OTHER, packed(1, 2))[1] == [20]


def test_insert_splits_an_edge_and_keeps_known_pages() -> None:
    tree = tree_with((packed(1, 2, 3, 4, 5, 6), [10, 11, 12]))
    _, pages = tree.insert(ROOT, packed(1, 2, 3, 4, 7, 8), [20, 21, 22])
    assert pages == [10, 11, 22]
    assert tree.match(ROOT, packed(1, 2, 3, 4, 5, 6))[1] == [10, 11, 12]
    assert tree.match(ROOT, packed(1, 2, 3, 4, 7, 8))[1] == [10, 11, 22]
    assert tree.total_pages == 4


def test_locked_pages_are_not_evicted_and_a_split_keeps_the_lock() -> None:
    tree = tree_with((packed(1, 2, 3, 4), [10, 11]))
    node, _ = tree.match(ROOT, packed(1, 2, 3, 4))
    tree.lock(node)
    assert tree.evictable_pages == 0
    tree.match(ROOT, packed(1, 2))  # splits the locked edge
    assert tree.evictable_pages == 0
    assert tree.evict(10) == []
    tree.unlock(node)
    assert tree.evictable_pages == 2
    assert sorted(tree.evict(10)) == [10, 11]
    assert tree.total_pages == 0


def test_a_lock_on_a_prefix_lets_its_continuation_go() -> None:
    tree = tree_with((packed(1, 2, 3, 4), [10, 11]))
    node, _ = tree.match(ROOT, packed(1, 2))
    tree.lock(node)
    assert tree.evict(10) == [11]
    assert tree.match(ROOT, packed(1, 2, 3, 4))[1] == [10]


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    tree = tree_with((packed(1, 2), [10]), (packed(3, 4), [11]), (packed(5, 6), [12]))
    tree.match(ROOT, packed(1, 2))
    assert tree.evict(1) == [11]
    assert tree.evict(1) == [12]
    assert tree.evict(1) == [10]


def test_a_parent_becomes_evictable_when_its_last_leaf_is_gone() -> None:
    tree = tree_with((packed(1, 2, 3, 4), [10, 11]), (packed(1, 2, 5, 6), [99, 12]))
    assert tree.evictable_pages == 3
    assert sorted(tree.evict(3)) == [10, 11, 12]
    assert tree.evictable_pages == 0
