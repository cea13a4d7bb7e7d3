"""How pages get from a sender's ranks to those of the receiver, which may hold other key-value heads of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from llm_runtime.actors.kv_pages import RankPages
from llm_runtime.transport.transfer import Piece


class Mismatch(ValueError):
    """The pages of the two sides cannot be exchanged. One sentence that says why."""


class HeadSlice(NamedTuple):
    """Heads of a sender's rank that a rank of the receiver holds too, as each of them counts its heads."""

    own_rank: int
    theirs: slice
    ours: slice


@dataclass(frozen=True)
class Route:
    """The way of a page.

    Attributes:
        direct: (sender's rank, own rank) whose pages are equal: read straight into place.
        sliced: by sender's rank, what is taken out of its pages, which have to be read into a staging block first.
    """

    theirs: Sequence[RankPages]
    own: Sequence[RankPages]
    direct: list[tuple[int, int]]
    sliced: dict[int, list[HeadSlice]]

    @property
    def direct_bytes(self) -> int:
        """Bytes a page that are read straight into place."""
        return sum(self.own[own].format.page_bytes for _, own in self.direct)

    @property
    def staged_bytes(self) -> int:
        """Bytes a page that are read into a staging block."""
        return sum(self.theirs[rank].format.page_bytes for rank in self.sliced)

    def pieces(self, sources: Sequence[int], targets: Sequence[int], staging: tuple[int, int]) -> list[Piece]:
        """What to read so that pages `sources` of the sender come into pages `targets`.

        `staging` is the region and the offset of the staging block, in which the pages of each sliced rank follow each
        other, in the order of `sliced`. Neighbours on both sides are one piece.
        """
        pieces = []
        for theirs, own in self.direct:
            size = self.own[own].format.page_bytes
            for source, target, count in _runs(sources, targets):
                pieces.append(Piece(theirs, source * size, own, target * size, count * size))
        region, offset = staging
        for theirs in self.sliced:
            size = self.theirs[theirs].format.page_bytes
            for source, place, count in _runs(sources, range(len(sources))):
                pieces.append(Piece(theirs, source * size, region, offset + place * size, count * size))
            offset += len(sources) * size
        return pieces


def find_route(theirs: Sequence[RankPages], own: Sequence[RankPages]) -> Route:
    """The way from the sender's ranks to the own ones. Raises Mismatch if there is none."""
    direct, sliced = [], dict[int, list[HeadSlice]]()
    for number, rank in enumerate(own):
        same = [other for other, candidate in enumerate(theirs) if candidate.heads == rank.heads]
        if same:
            source = same[number % len(same)]  # where all hold the same, each is read from
            if theirs[source].format != rank.format:
                raise _mismatch(theirs[source], rank)
            direct.append((source, number))
            continue
        first, end = rank.heads
        covered = first
        for other, candidate in sorted(enumerate(theirs), key=lambda item: item[1].heads):
            low, high = max(covered, candidate.heads[0]), min(end, candidate.heads[1])
            if low != covered or low >= high:
                continue
            if not _differ_in_heads_alone(candidate, rank):
                raise _mismatch(candidate, rank)
            shift = candidate.heads[0]
            part = HeadSlice(number, slice(low - shift, high - shift), slice(low - first, high - first))
            sliced.setdefault(other, []).append(part)
            covered = high
        if covered != end:
            raise Mismatch(f"the sender's ranks do not hold the key-value heads {covered} to {end - 1}")
    return Route(theirs, own, direct, sliced)


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) of the longest runs in which both count up."""
    start = 0
    for stop in range(1, len(sources) + 1):
        if stop == len(sources) or sources[stop] != sources[stop - 1] + 1 or targets[stop] != targets[stop - 1] + 1:
            yield sources[start], targets[start], stop - start
            start = stop


def _differ_in_heads_alone(theirs: RankPages, own: RankPages) -> bool:
    return all(
        rank.format.kv_heads == rank.heads[1] - rank.heads[0] for rank in (theirs, own)
    ) and theirs.format == msgspec.structs.replace(own.format, kv_heads=theirs.format.kv_heads)


def _mismatch(theirs: RankPages, own: RankPages) -> Mismatch:
    return Mismatch(
        f"the sender's pages are {theirs.format.fingerprint} and the own ones {own.format.fingerprint}: "
        "give both engines the same checkpoint, dtype and page size"
    )
