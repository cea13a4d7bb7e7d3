"""Constraints at work: which tokens each constrained slot may draw next.

A slot's automaton follows the tokens of its output, wherever they have come from: tokens that are new to it are
accepted, and when others take their place it goes back. So a position's mask is a function of the tokens before it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.grammar import BadGrammar, Workshop, xgrammar
from actors.messages import OpenSlot

logger = logging.getLogger(__name__)

Int32s = NDArray[np.int32]

THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
"""That fill the masks of a step. More than one where the cores are many, as beside a GPU: a mask takes some 50 µs."""


class Automaton:
    """One slot's.

    Args:
        matcher: xgrammar's, at its beginning; None where there is none to be had.

    Attributes:
        stops: what may follow a complete answer, int32.
        lost: the output is not what the constraint allows, or is over.
    """

    def __init__(self, matcher: Any, stops: Int32s) -> None:
        self.matcher = matcher
        self.stops = stops
        self.lost = matcher is None
        self._first = 0  # output tokens before the first one that it was shown
        self._count = 0  # tokens accepted
        self._over = False  # the last of them has ended the answer

    def note(self, index: int) -> None:
        """Output tokens from `index` on may be others than before."""
        valid = max(index - self._first, 0)
        if valid < self._count:
            self.matcher.rollback(self._count - valid)
            self._count, self._over = valid, False

    def follow(self, output: Int32s, first: int = 0) -> None:
        """Goes to where the output is, from wherever it was.

        Args:
            first: where what is constrained begins.
        """
        if self.matcher is None:
            return
        self.note(len(output) if first == self._first else 0)
        self._first = first
        for token in output[first + self._count :].tolist():
            if self._over or not self.matcher.accept_token(token):
                break
            self._count += 1
            self._over = self.matcher.is_terminated()
        self.lost = self._over or first + self._count < len(output)


class Masks:
    """The automata of constrained slots.

    Args:
        grammars: compiles constraints.
        vocab_size: number of logits.
    """

    def __init__(self, grammars: Workshop, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._slots: dict[int, Automaton] = {}
        self._batch: Any = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def open(self, opened: OpenSlot) -> None:
        """A slot gets the constraint of its request, or none."""
        self._slots.pop(opened.slot, None)
        sampling = opened.sampling
        if sampling.constraint is None:
            return
        try:
            compiled = self._grammars.get(sampling.constraint)
            stops = self._grammars.tokens.stops(sampling.stop_token_ids)
            matcher = xgrammar().GrammarMatcher(compiled, override_stop_tokens=stops or None)
        except BadGrammar as error:  # its scheduler would not have let it come so far
            logger.error("slot %d gets no text: %s", opened.slot, error)
            matcher, stops = None, [token for token in sampling.stop_token_ids if token < self._vocab_size]
        self._slots[opened.slot] = Automaton(matcher, np.array(stops, np.int32))

    def note(self, slot: int, index: int) -> None:
        """Tokens of a constrained slot's output from `index` on may be others than before."""
        self._slots[slot].note(index)

    def lost(self, slot: int) -> bool:
        """Whether the output of the slot, as `allowed` was told it, is not what its constraint allows, or is over."""
        return self._slots[slot].lost

    def allowed(self, slots: list[int], outputs: list[Int32s], firsts: list[int] | None = None) -> Int32s:
        """Which tokens may come next: words of `kernels.TokenMasks`, for B constrained slots and their outputs so far,
        of which the first ones may be free. In every row at least one may, but for a constraint that ends in nowhere
        of a model that has no end-of-sequence token."""
        masks = np.zeros((len(slots), self._words), np.int32)
        automata = [self._slots[slot] for slot in slots]
        for automaton, output, first in zip(automata, outputs, firsts or [0] * len(slots), strict=True):
            automaton.follow(output, first)
        going = [row for row, automaton in enumerate(automata) if not automaton.lost]
        if going:
            if self._batch is None:
                self._batch = xgrammar().BatchGrammarMatcher(max_threads=THREADS)
            self._batch.batch_fill_next_token_bitmask([automata[row].matcher for row in going], masks, going)
        for row in np.flatnonzero(~masks.any(axis=1)).tolist():
            allow(masks[row], automata[row].stops)
        return masks

    def over(self, slot: int, mask: Int32s) -> bool:
        """Whether all tokens that a mask allows end the answer."""
        allowed, stops = unpacked(mask, self._vocab_size), self._slots[slot].stops
        return int(np.count_nonzero(allowed)) == int(np.count_nonzero(allowed[stops]))


def allow(mask: Int32s, tokens: Int32s) -> None:
    """Adds tokens to those that a mask allows."""
    np.bitwise_or.at(mask.view(np.uint32), tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32))


def unpacked(mask: Int32s, vocab_size: int) -> NDArray[np.bool_]:
    """Which tokens a mask allows: [V]."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
