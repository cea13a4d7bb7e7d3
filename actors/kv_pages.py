"""What the two ends of a KV transfer say about their pages: the arenas of an engine's ranks and what lies in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from llm_runtime.actors.actor import BadMessage, StartFailure
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.transport import Arena
from llm_runtime.transport.transfer import Region
from llm_runtime.transport.transfer.create import TransferKind

Positive = Annotated[int, Meta(ge=1, lt=2**31)]


class RankPages(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The KV arena of one rank.

    Attributes:
        arena: the descriptor's name.
        heads: the model's key-value heads [first, end) that the rank holds. Ranks with the same heads hold the same.
    """

    arena: str
    format: KVFormat
    heads: tuple[Annotated[int, Meta(ge=0)], Positive]


class SenderPages(msgspec.Struct, array_like=True, frozen=True):
    """`Offered.endpoint`, as MessagePack: whose pages are offered, and how they are reached.

    Attributes:
        engine: the endpoint of the sender's transfer engine; region n is the arena of `ranks[n]`.
    """

    kind: TransferKind
    num_pages: Positive
    ranks: Annotated[list[RankPages], Meta(min_length=1, max_length=64)]
    engine: bytes


def map_arenas(
    descriptors: Mapping[str, int], ranks: Sequence[RankPages], num_pages: int
) -> tuple[list[Arena], list[Region]]:
    """The arenas of an engine's ranks, and their pages. Raises StartFailure if one is missing or too small."""
    arenas, regions = [], []
    for rank in ranks:
        if rank.arena not in descriptors:
            raise StartFailure(f"the descriptor {rank.arena} was not handed down")
        arena = Arena(descriptors[rank.arena])
        needed = num_pages * rank.format.page_bytes
        if arena.size < needed:
            raise StartFailure(f"{rank.arena} has {arena.size} bytes, and {num_pages} pages take {needed}")
        arenas.append(arena)
        regions.append(Region(rank.arena, arena.buffer[:needed]))
    return arenas, regions


def unpack_pages(packed: bytes, num_pages: int) -> list[int]:
    """The page numbers (i32) of a message. Raises BadMessage for one that does not exist."""
    if len(packed) % 4:
        raise BadMessage(f"{len(packed)} bytes are no page numbers")
    pages = memoryview(packed).cast("i").tolist()
    if pages and not 0 <= min(pages) <= max(pages) < num_pages:
        raise BadMessage(f"pages {min(pages)} to {max(pages)} are not among {num_pages} pages")
    return pages
