"""Constraints at work: which tokens each constrained slot may draw next.

A mask of all tokens takes a tenth of a millisecond and more; to ask about one token takes a few microseconds. A slot's
matcher follows the tokens of its output, wherever they have come from: tokens that are new to it are accepted, and when
others take their place it goes back. So what may be drawn at a position is a function of the tokens before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm_runtime.actors.grammar import BadGrammar, GrammarCompiler, Matcher
from llm_runtime.actors.messages import NewRequest
from llm_runtime.actors.rank.room import Room

logger = logging.getLogger(__name__)

Int32s = NDArray[np.int32]


class Constrained:
    """One slot's.

    Args:
        matcher: at its beginning; None where there is none to be had.
        room: what is known of the answer's end.

    Attributes:
        stops: what may follow a complete answer, int32.
        lost: the output is not what the constraint allows, or is over.
    """

    def __init__(self, matcher: Matcher | None, stops: Int32s, room: Room | None) -> None:
        self.matcher = matcher
        self.stops = stops
        self.lost = matcher is None
        self._room = room
        self._first = 0  # output tokens before the first one that it was shown
        self._taken: list[int] = []  # tokens accepted

    def note(self, index: int, tokens: Sequence[int] = ()) -> None:
        """Output tokens from `index` on may be others than before: `tokens`, and then who knows."""
        if self.matcher is None:
            return
        at = index - self._first
        valid = max(at, 0)
        for token in tokens[valid - at :]:
            if valid >= len(self._taken) or self._taken[valid] != token:
                break
            valid += 1
        if valid < len(self._taken):
            self._back(len(self._taken) - valid)
            if self._room is not None:
                self._room.forget()

    def follow(self, output: Int32s, first: int = 0) -> None:
        """Goes to where the output is, from wherever it was.

        Args:
            first: where what is constrained begins.
        """
        if self.matcher is None:
            return
        self.note(len(output) if first == self._first else 0)
        self._first = first
        self._accept(output[first + len(self._taken) :].tolist())
        self.lost = self.matcher.over or first + len(self._taken) < len(output)
        if self._room is not None and not self.lost:
            back = self._room.unknown(len(output), first)
            if back:  # it wants to see the answer as it was so many tokens ago
                self._back(back)
            self._room.look(self.matcher, len(output) - back)
            if back:
                self._accept(output[first + len(self._taken) :].tolist())

    def takes(self, token: int) -> bool:
        """Whether a token may come next; False also where only a mask can tell, whatever the token is. After
        `follow`."""
        if self.lost or self.matcher is None:
            return token in self.stops
        if self.matcher.limited or not self.matcher.accept(token):
            return False
        if self.near_end:
            self.matcher.rollback(1)
        else:  # it stays: most probably it comes next
            self._taken.append(token)
        return True

    def closing(self, token: int) -> int | None:
        """The token that must come in place of the one that was drawn, so that the answer can still end. After
        `follow`."""
        if self._room is None or self.matcher is None or self.lost:
            return None
        return self._room.replaced(self.matcher, token)

    @property
    def near_end(self) -> bool:
        """Whether drawn tokens must be shown to `closing`. After `follow`."""
        return self._room is not None and not self.lost and self._room.near

    def _back(self, count: int) -> None:
        assert self.matcher is not None
        self.matcher.rollback(count)
        del self._taken[-count:]

    def _accept(self, tokens: list[int]) -> None:
        assert self.matcher is not None
        for token in tokens:
            if not self.matcher.accept(token):
                break
            self._taken.append(token)
            if self._room is not None:
                self._room.accepted(self.matcher, token)


class TokenBitmasks:
    """The matchers of constrained slots.

    Args:
        grammars: compiles constraints.
        vocab_size: number of logits.
    """

    def __init__(self, grammars: GrammarCompiler, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._slots: dict[int, Constrained] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def open(self, opened: NewRequest) -> None:
        """A slot gets the constraint of its request, or none."""
        self._slots.pop(opened.slot, None)
        sampling = opened.sampling
        if sampling.constraint is None:
            return
        matcher: Matcher | None = None
        room: Room | None = None
        try:
            tokens = self._grammars.backend.tokens
            stops = tokens.stops(sampling.stop_token_ids)
            compiled = self._grammars.get(sampling.constraint)
            matcher = compiled.matcher(stops)
            if stops:
                room = Room(tokens, compiled, opened.room or sampling.max_tokens, stops[0])
        except BadGrammar as error:  # its scheduler would not have let it come so far
            logger.error("slot %d gets no text: %s", opened.slot, error)
            stops = [token for token in sampling.stop_token_ids if token < self._vocab_size]
        self._slots[opened.slot] = Constrained(matcher, np.array(stops, np.int32), room)

    def note(self, slot: int, index: int, tokens: Sequence[int]) -> None:
        """Tokens of a constrained slot's output from `index` on are `tokens`, and behind them others than before."""
        self._slots[slot].note(index, tokens)

    def takes(self, slot: int, token: int, output: Int32s, first: int = 0) -> bool:
        """Whether a token may follow an output, of which the `first` tokens may be free. False also where only the mask
        of `allowed` can tell, whatever the token is."""
        found = self._slots[slot]
        found.follow(output, first)
        return found.takes(token)

    def lost(self, slot: int) -> bool:
        """Whether the output of the slot, as last told, is not what its constraint allows, or is over."""
        return self._slots[slot].lost

    def near_end(self, slot: int) -> bool:
        """Whether `closing` must be asked about the slot's drawn token."""
        return self._slots[slot].near_end

    def closing(self, slot: int, token: int) -> int | None:
        """The token that must come in place of the one that was drawn, so that the answer ends within its room."""
        return self._slots[slot].closing(token)

    def allowed(self, slots: list[int], outputs: list[Int32s], firsts: list[int] | None = None) -> Int32s:
        """Which tokens may come next: words of `kernels.TokenMasks`, for B constrained slots and their outputs so far,
        of which the first ones may be free. In every row at least one may, but for a constraint that ends in nowhere
        of a model that has no end-of-sequence token."""
        masks = np.zeros((len(slots), self._words), np.int32)
        found = [self._slots[slot] for slot in slots]
        for each, output, first in zip(found, outputs, firsts or [0] * len(slots), strict=True):
            each.follow(output, first)
        going = {row: each.matcher for row, each in enumerate(found) if each.matcher is not None and not each.lost}
        if going:
            self._grammars.backend.fill(list(going.values()), masks, list(going))
        for row in np.flatnonzero(~masks.any(axis=1)).tolist():
            allow(masks[row], found[row].stops)
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
