"""Token ids as they travel in messages: packed little-endian int32."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable


def pack_ids(ids: Iterable[int]) -> bytes:
    """Packs token ids as i32."""
    packed = array("i")
    packed.extend(ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """The token ids in a packed i32 array. Raises ValueError when the length is not a multiple of 4."""
    ids = array("i")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
