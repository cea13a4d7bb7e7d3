"""Constraints at work: which tokens each constrained slot may draw next.

A slot's automaton follows the tokens of its output, wherever they have come from: tokens that are new to it are
accepted, and when a step is run again it goes back. So the mask of a position is a function of the tokens before it.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.grammar import BadGrammar, Workshop, xgrammar
from actors.messages import OpenSlot

logger = logging.getLogger(__name__)

Int32s = NDArray[np.int32]


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
        self._accepted = np.zeros(256, np.int32)
        self._count = 0

    def follow(self, output: Int32s) -> None:
        """Goes to where the output is, from wherever it was."""
        if self.matcher is None:
            return
        common = min(self._count, len(output))
        differing = np.flatnonzero(self._accepted[:common] != output[:common])
        common = int(differing[0]) if len(differing) else common
        if common < self._count:
            self.matcher.rollback(self._count - common)
            self._count = common
        if len(output) > len(self._accepted):
            self._accepted = np.resize(self._accepted, 2 * len(output))
        for token in output[common:].tolist():
            if self.matcher.is_terminated() or not self.matcher.accept_token(token):
                break
            self._accepted[self._count] = token
            self._count += 1
        self.lost = self._count < len(output) or self.matcher.is_terminated()


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

    def lost(self, slot: int) -> bool:
        """Whether the output of the slot, as `allowed` was told it, is not what its constraint allows, or is over."""
        return self._slots[slot].lost

    def allowed(self, slots: list[int], outputs: list[Int32s]) -> Int32s:
        """Which tokens may come next: masks as `kernels.masked` takes them, for B constrained slots and their outputs
        so far. In every row at least one may, but for a constraint that ends in nowhere of a model that has no
        end-of-sequence token."""
        masks = np.zeros((len(slots), self._words), np.int32)
        automata = [self._slots[slot] for slot in slots]
        for automaton, output in zip(automata, outputs, strict=True):
            automaton.follow(output)
        going = [row for row, automaton in enumerate(automata) if not automaton.lost]
        if going:
            if self._batch is None:
                self._batch = xgrammar().BatchGrammarMatcher(max_threads=1)
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
