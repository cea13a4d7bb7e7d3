"""Prompt lookup against a search through all tokens, and what it learns."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest

from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.drafters.ngram import MAX_CANDIDATES, NgramDrafter


def drafter(tokens: array[int], shortest: int, longest: int) -> NgramDrafter:
    config = Config(
        "main", "m", "", "", "", 16, 4, 64, speculation="ngram", prompt_lookup_min=shortest, prompt_lookup_max=longest
    )
    return NgramDrafter(tokens, config)


def longest_match(tokens: list[int], shortest: int, longest: int) -> int:
    """Length of the longest run, up to `longest`, with which the tokens end and that stands in them before."""
    for length in range(longest, shortest - 1, -1):
        tail = tokens[len(tokens) - length :]
        if length < len(tokens) and any(tokens[i : i + length] == tail for i in range(len(tokens) - length)):
            return length
    return 0


@pytest.mark.parametrize("seed", range(60))
def test_guesses_follow_the_longest_match(seed: int) -> None:
    draw = random.Random(seed)
    tokens = array("i", [draw.randrange(4) for _ in range(draw.randrange(1, 12))])
    lookup = drafter(tokens, 2, 4)
    for _ in range(10):
        tokens.extend(draw.randrange(4) for _ in range(draw.randrange(1, 3)))
        lookup.follow()
        known = tokens.tolist()
        wanted = longest_match(known, 2, 4)
        if len(known) <= MAX_CANDIDATES:  # with more, a longer match may be farther away than is looked
            assert min(lookup.matched, 4) == wanted
        assert bool(lookup.matched) == bool(wanted)
        if lookup.matched:
            guess = list(lookup.guess(3))
            match = known[len(known) - min(lookup.matched, 4) :]
            followed = known + guess
            places = [i for i in range(len(known) - len(match)) if known[i : i + len(match)] == match]
            assert guess in [followed[i + len(match) : i + len(match) + 3] for i in places]


def test_a_loop_is_taken_to_go_on() -> None:
    lookup = drafter(array("i", [9, 1, 2, 3, 1, 2, 3, 1, 2]), 2, 8)
    assert lookup.guess(7) == (3, 1, 2, 3, 1, 2, 3)


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    tokens = array("i", range(50))
    lookup = drafter(tokens, 2, 8)
    tokens.extend(range(50, 100))
    lookup.follow()
    assert lookup.matched == 0
    assert lookup.rate == 0.0


def test_trust_grows_with_right_guesses_and_goes_with_wrong_ones() -> None:
    tokens = array("i", [1, 2, 3, 4, 5] * 2)
    lookup = drafter(tokens, 2, 3)
    first = lookup.chances(4)
    assert all(0 < later <= earlier <= 1 for earlier, later in pairwise(first))
    tokens.extend([1, 2, 3, 4, 5] * 20)
    lookup.follow()
    assert lookup.matched > 90
    assert lookup.chances(4)[3] > max(0.9, first[3])
    for number in range(100, 140):
        tokens.extend([1, 2, number])
        lookup.follow()
    tokens.extend([1, 2])
    lookup.follow()
    assert lookup.matched == 2
    assert lookup.rate < 0.1
