"""Who is admitted first, and when a request becomes suspect."""

from __future__ import annotations

import numpy as np
import pytest

from llm_runtime.actors.messages import Generate, SamplingParams, TextParams
from llm_runtime.actors.scheduler.pages import PageLedger, PagePool, page_ledger_bytes
from llm_runtime.actors.scheduler.poison import Bisection
from llm_runtime.actors.scheduler.policies import LPM_LIMIT, POLICIES
from llm_runtime.actors.scheduler.radix import PrefixTree
from llm_runtime.actors.scheduler.request import Request
from llm_runtime.transport import Arena

PAGE_SIZE = 4


def request(order: int, prompt: list[int], priority: int = 0) -> Request:
    packed = np.array(prompt, np.int32).tobytes()
    message = Generate(str(order), 0, packed, SamplingParams(max_tokens=4, seed=0), TextParams(), priority=priority)
    return Request(message, "ingress0", order, PAGE_SIZE)


@pytest.fixture
def tree() -> PrefixTree:
    """Knows two pages of sevens, and one of eights."""
    pool = PagePool(PageLedger(Arena(Arena.create("p", page_ledger_bytes(16, PAGE_SIZE))), 16, PAGE_SIZE), True)
    for first, length in ((7, 2), (8, 1)):
        known = request(0, [first] * (length * PAGE_SIZE))
        pages = pool.allocate(length)
        assert pages is not None
        pool.tree.insert(known.root, known.tokens.tobytes(), pages)
    return pool.tree


def orders(waiting: list[Request], policy: str, tree: PrefixTree) -> list[int]:
    return [each.order for each in POLICIES.get(policy)(waiting, tree)]


def test_fcfs_goes_by_priority_and_then_by_arrival(tree: PrefixTree):
    waiting = [request(3, [1] * 9), request(1, [7] * 9), request(2, [1] * 9, priority=1), request(0, [8] * 9)]
    assert orders(waiting, "fcfs", tree) == [2, 0, 1, 3]


def test_lpm_goes_by_priority_then_by_the_longest_known_prefix_and_then_by_arrival(tree: PrefixTree):
    waiting = [
        request(0, [1] * 9),
        request(1, [8] * 9),
        request(2, [7] * 9),
        request(3, [1] * 9, priority=1),
        request(4, [7] * 9, priority=1),
        request(5, [7] * 9),
        request(6, [7] * 9, priority=-1),
    ]
    assert orders(waiting, "lpm", tree) == [4, 3, 2, 5, 1, 0, 6]


def test_lpm_with_very_many_waiting_goes_by_arrival(tree: PrefixTree):
    waiting = [request(order, [7 if order % 2 else 1] * 9) for order in range(LPM_LIMIT + 1)]
    assert orders(waiting, "lpm", tree) == list(range(LPM_LIMIT + 1))
    assert orders(waiting[1:], "lpm", tree)[:2] == [1, 3]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_request_is_suspect_at_exactly_the_limit_of_deaths(limit: int):
    bisection, pair = Bisection(limit), [request(0, [1]), request(1, [1])]
    for _ in range(limit - 1):
        assert bisection.died(pair) is None
        assert bisection.on_trial is None
    assert bisection.died(pair) is None
    assert bisection.on_trial == pair[:1]


def test_an_answer_between_deaths_begins_the_count_anew():
    bisection, one = Bisection(2), [request(0, [1])]
    for _ in range(3):
        assert bisection.died(one) is None
        assert bisection.on_trial is None
        bisection.answered(one)
