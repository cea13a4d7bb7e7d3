"""Sentencepiece vocabularies: spaces written as `▁`, unknown characters as byte tokens `<0xNN>`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

PREFIX = "▁"

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_to_bytes(piece: str) -> bytes:
    """The bytes that a piece stands for."""
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(PREFIX, " ").encode()


def merges_of_scores(tokens: Sequence[str], scores: Sequence[float], special: Collection[int]) -> list[tuple[str, str]]:
    """The BPE merges that a sentencepiece vocabulary implies, first to last.

    Sentencepiece merges the neighbours whose union has the highest score. So each way to cut a token into two tokens is
    a merge, ranked by the token's score. `special` ids take no part.
    """
    known = {token: place for place, token in enumerate(tokens) if place not in special}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, place in known.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((-scores[place], known[left], known[right], left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]
